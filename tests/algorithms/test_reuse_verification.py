"""The step that verifies a pass."""

from __future__ import annotations

import warnings

import pytest
from cases import (
    CONV,
    MLP,
    Case,
    loader,
    record_selections,
)
from composer import Callback
from composer.core import Event
from one_pass import M, always, assert_same_parameters, trained
from torch import nn

from composer_gradmatch import LossBackprop
from composer_gradmatch.benchmarks.peak import PeakMemory
from composer_gradmatch.reuse import verification
from composer_gradmatch.reuse.unsupported import UnsupportedError


def test_an_error_while_verifying_is_no_error_of_the_run(monkeypatch, served):
    def broken(*_):
        raise TypeError("unheard of")

    monkeypatch.setattr("composer_gradmatch.reuse.verification.check_gradients", broken)
    models = [CONV.model(), CONV.model()]
    trained(models[0], loader(CONV.data(M), M), [always(reuse=False)], max_duration="2ba")
    with pytest.warns(UserWarning, match="could not be verified: TypeError: unheard of"):
        trained(models[1], loader(CONV.data(M), M), [always()], max_duration="2ba")
    assert not served
    assert_same_parameters(*models, tolerance=1e-6)


@pytest.mark.parametrize("broken", [False, True])
def test_draws_of_the_selection_are_not_repeated_after_a_verification(broken, monkeypatch):
    """Steps 1 and 7 are verified; of a model without dropout nothing else draws."""
    monkeypatch.setattr("composer_gradmatch.reuse.graphs.FIRST_REVERIFICATION", 7)
    if broken:
        monkeypatch.setattr("composer_gradmatch.reuse.output_checks.check_outputs", lambda *_: 1 / 0)
        monkeypatch.setattr("composer_gradmatch.reuse.verification.check_outputs", lambda *_: 1 / 0)
    picks = []
    for reuse in (False, True):
        algorithm = always(LossBackprop, reuse=reuse, beta=0.0)
        seen = record_selections(algorithm)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LossBackprop: the activations")
            trained(MLP.model(), loader(MLP.data(M), M), [algorithm], max_duration="11ba", seed=3)
        picks.append([selection.indices.tolist() for _, selection in seen])
    assert len({tuple(sorted(each)) for each in picks[1]}) > 5
    assert picks[0] == picks[1]


def test_gradients_are_verified_again_and_the_run_goes_on_in_two_passes(monkeypatch, served):
    """As where samples are mixed only once some value has grown, which nothing shows before."""
    steps, original = [], verification.check_gradients

    def check(*args):
        steps.append(len(served))
        original(*args)
        if len(steps) == 2:
            raise UnsupportedError("grown")

    monkeypatch.setattr(verification, "check_gradients", check)
    monkeypatch.setattr("composer_gradmatch.reuse.graphs.FIRST_REVERIFICATION", 10)
    with pytest.warns(UserWarning, match="two forward passes are made: grown"):
        trained(MLP.model(), loader(MLP.data(M), M), [always()], max_duration="12ba")
    assert steps == [0, 9]
    assert served == [9] * 9


class PeakOfStep(Callback):
    """Of epochs of one step: the loader is asked once more than it has batches, and what that opens stays open."""

    def __init__(self):
        self.peaks = []

    def run_event(self, event, state, logger):
        if event == Event.EPOCH_START:
            self.memory = PeakMemory().__enter__()
        elif event == Event.BATCH_END:
            self.memory.__exit__(None, None, None)
            self.peaks.append(self.memory.bytes)


def test_the_step_that_verifies_does_not_hold_two_passes_activations():
    layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.2))]
    case = Case("deep", lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 64, 5)), "19", (64, 64))
    peaks = PeakOfStep()
    activations = 6 * 2.25 * 2 * M * 64 * 64 * 4
    trained(case.model(), loader(case.data(2 * M), 2 * M), [always()], max_duration="2ep", callbacks=[peaks])
    assert peaks.peaks[1] > activations
    assert peaks.peaks[0] < 1.5 * peaks.peaks[1]
