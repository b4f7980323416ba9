"""The private interfaces of Composer: all there with the installed version, and what is done without them."""

from __future__ import annotations

import sys

import pytest
import torch
from cases import BATCHNORM, MLP, loader, make_trainer
from composer import Trainer
from composer.algorithms.ghost_batchnorm import apply_ghost_batchnorm

from composer_gradmatch.forward import composer_private
from composer_gradmatch.forward.composer_private import (
    check_step,
    generated_run_name,
    ghost_batch_size,
    step_of,
    unwrap_step,
    wrap_step,
)


def test_they_are_there():
    from composer.trainer.trainer import _generate_run_name

    assert isinstance(_generate_run_name(), str)
    assert callable(Trainer._train_batch)
    check_step()
    assert [each.__name__ for each in composer_private._GHOST_BATCH_NORMS] == [
        f"GhostBatchNorm{dimensions}d" for dimensions in (1, 2, 3)
    ]


def test_the_layers_of_ghost_batch_normalisation_are_found(monkeypatch):
    model = BATCHNORM.model()
    assert ghost_batch_size(model) == 1
    apply_ghost_batchnorm(model, ghost_batch_size=8)
    assert ghost_batch_size(model) == 8
    monkeypatch.setitem(sys.modules, "composer.algorithms.ghost_batchnorm.ghost_batchnorm", None)
    assert composer_private._ghost_batch_norms() == ()
    monkeypatch.setattr(composer_private, "_GHOST_BATCH_NORMS", ())
    assert ghost_batch_size(model) == 1


def test_a_run_has_a_name_in_any_case(monkeypatch):
    names = [generated_run_name() for _ in range(2)]
    monkeypatch.delattr("composer.trainer.trainer._generate_run_name")
    torch.manual_seed(0)
    names += [generated_run_name() for _ in range(2)]
    assert all(names)
    assert len(set(names)) == 4


def test_a_trainer_without_its_step_is_refused(monkeypatch):
    monkeypatch.setattr(composer_private, "_STEP", "_gone")
    with pytest.raises(ImportError, match="Trainer has no _gone"):
        check_step()


def test_a_trainer_makes_its_steps_by_another_function_and_in_its_own_way_again():
    trainer = make_trainer(MLP.model(), loader(MLP.data(8), 4), [], max_duration="1ep")
    own, calls = step_of(trainer), []

    def step(*args):
        calls.append(args)
        return own(*args)

    unwrap_step(trainer)
    assert step_of(trainer) == own
    wrap_step(trainer, step)
    trainer.fit()
    assert len(calls) == 2
    unwrap_step(trainer)
    assert step_of(trainer) == own
