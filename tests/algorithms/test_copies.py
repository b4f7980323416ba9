"""Algorithms are copied and pickled, before and after a run: by their arguments and their state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import MLP, ON, make_trainer
from torch.utils.data import DataLoader

from composer_gradmatch import (
    GradMatch,
    ImportanceBackprop,
    LossBackprop,
    RandomBackprop,
    RuleBackprop,
    number_samples,
    select_first,
)

WAYS = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda each: pickle.loads(pickle.dumps(each))}
SUSPECTS = {"refresh": "3ep", "suspects": {"after": "1ep", "margin": 0.0}}
MADE = {
    "gradmatch": lambda: GradMatch(0.0, 1.0, 0.3, interrupt=0, solver="swap", ridge=0.1),
    "one pass": lambda: GradMatch(**ON, keep=0.3, reuse_activations=True),
    "stored": lambda: GradMatch(**ON, keep=0.3, **SUSPECTS),
    "losses": lambda: LossBackprop(**ON, keep=0.3, history=50),
    "importance": lambda: ImportanceBackprop(**ON, keep=0.3),
    "random": lambda: RandomBackprop(**ON, keep=0.3, **SUSPECTS),
    "rule": lambda: RuleBackprop("kakurenbo", **ON, keep=1.0, refresh="1ep", options={"hide": 0.2}),
}


def trainer_of(algorithm, **kwargs):
    data = number_samples(MLP.data(60))
    loader = DataLoader(data, 20, collate_fn=data.collate_fn)
    return make_trainer(MLP.model(), loader, [algorithm], algorithm_passes=[select_first], seed=3, **kwargs)


def trained(algorithm):
    trainer = trainer_of(algorithm, max_duration="2ep")
    trainer.fit()
    trainer.close()
    return torch.cat([each.flatten() for each in trainer.state.model.state_dict().values() if each.is_floating_point()])


@pytest.mark.parametrize(
    ("name", "way"),
    [*[(name, "deepcopy") for name in MADE], ("stored", "copy"), ("stored", "pickle"), ("importance", "pickle")],
)
def test_a_copy_of_a_trained_one_has_its_state_and_trains_as_a_new_one(name, way):
    algorithm = MADE[name]()
    steps = trained(algorithm)
    other = WAYS[way](algorithm)
    assert type(other) is type(algorithm)
    assert_alike(other.state_dict(), algorithm.state_dict())
    if algorithm.selector.leaves_out:
        suspected = algorithm.selector.store.suspected()
        assert len(suspected)
        assert torch.equal(other.selector.store.suspected(), suspected)
    torch.testing.assert_close(trained(other), steps, rtol=0, atol=0)


def assert_alike(ones, others):
    if isinstance(ones, dict):
        assert ones.keys() == others.keys()
        for key in ones.keys() - {"repr"}:
            assert_alike(ones[key], others[key])
    elif isinstance(ones, torch.Tensor):
        torch.testing.assert_close(ones, others, equal_nan=True)
    elif isinstance(ones, list | tuple):
        for one, other in zip(ones, others, strict=True):
            assert_alike(one, other)
    else:
        assert ones == others or ones != ones


def test_what_a_copy_learns_is_its_own():
    algorithm = MADE["stored"]()
    trained(algorithm)
    margins = algorithm.selector.store.store.margins.clone()
    other = copy.deepcopy(algorithm)
    other.selector.store.kept._restored["margins"].fill_(9.0)
    torch.testing.assert_close(algorithm.selector.store.store.margins, margins, equal_nan=True)


def test_a_copy_has_the_schedule_as_it_is_now():
    algorithm = RandomBackprop(keep=0.3)
    algorithm.keep, algorithm.end = 0.6, 1.0
    other = copy.deepcopy(algorithm)
    assert (other.keep, other.start, other.end) == (0.6, 0.5, 1.0)


def test_an_output_layer_that_is_a_module_stays_the_models():
    model = MLP.model()
    algorithm = GradMatch(**ON, output_layer=model.module[2])
    assert copy.deepcopy(algorithm).output_layer is model.module[2]
    both = copy.deepcopy([model, algorithm])
    assert both[1].output_layer is both[0].module[2]
    both = copy.deepcopy([algorithm, model])
    assert both[1].module[2] is not model.module[2]
