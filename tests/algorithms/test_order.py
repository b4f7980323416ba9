"""Selection beside other algorithms: what comes first, and what cannot go together."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import ANY_SIZE, ON, fit, record_selections
from composer import Algorithm, Callback, Event
from composer.algorithms import ColOut, CutMix, LabelSmoothing, MixUp, SelectiveBackprop
from selecting import SELECTING

from composer_gradmatch import GradMatch, RandomBackprop, select_first


class Spy(Algorithm):
    """Notes how many samples it sees on AFTER_DATALOADER."""

    def __init__(self):
        self.seen = []

    def match(self, event, state):
        return event == Event.AFTER_DATALOADER

    def apply(self, event, state, logger):
        self.seen.append(len(state.batch[0]))


@pytest.mark.parametrize("selecting", [*SELECTING, SelectiveBackprop])
@pytest.mark.parametrize("spy_first", [True, False])
def test_with_the_pass_selection_comes_first(selecting, spy_first):
    spy, algorithm = Spy(), selecting(keep=0.3, **ON)
    fit([spy, algorithm] if spy_first else [algorithm, spy])
    assert spy.seen[0] <= 6


def test_without_the_pass_composer_selects_last_and_we_warn_of_it():
    spy = Spy()
    fit([spy, SelectiveBackprop(keep=0.3, **ON)], algorithm_passes=None)
    assert spy.seen == [20]
    spy = Spy()
    with pytest.warns(UserWarning, match="(?s)Spy will change.*algorithm_passes=.composer_gradmatch.select_first"):
        fit([GradMatch(keep=0.3, **ON), spy], algorithm_passes=None)
    assert spy.seen == [20]


@pytest.mark.parametrize("passes", [None, [select_first]])
def test_no_warning_where_selection_does_come_first(passes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Cannot split tensor|The composer|.*deprecated")
        algorithms = [Spy(), GradMatch(keep=0.3, **ON)]
        fit(algorithms if passes is None else algorithms[::-1], algorithm_passes=passes, device_train_microbatch_size=2)


@pytest.mark.parametrize("other", [MixUp(alpha=0.2), CutMix(), ColOut(), LabelSmoothing(0.1)])
def test_trains_beside_algorithms_that_change_the_batch(other):
    algorithm = GradMatch(keep=0.3, **ON)
    trainer = fit(
        [algorithm, other], ANY_SIZE.model(), ANY_SIZE.data(60), max_duration="1ep", device_train_microbatch_size=4
    )
    assert trainer.state.timestamp.batch == 3
    assert torch.isfinite(torch.as_tensor(trainer.state.loss)).all()


def test_label_smoothing_reaches_the_weighted_loss():
    class Watch(Callback):
        losses: dict = {}  # noqa: RUF012

        def before_backward(self, state, logger):
            self.losses["got"] = float(state.loss.detach())
            self.losses["outputs"] = state.outputs.detach()
            self.losses["targets"] = state.batch[1]

    algorithm = GradMatch(keep=0.4, **ON)
    seen = record_selections(algorithm)
    fit([algorithm, LabelSmoothing(0.3)], callbacks=[Watch()], device_train_microbatch_size=20)
    losses = F.cross_entropy(Watch.losses["outputs"], Watch.losses["targets"], reduction="none", label_smoothing=0.3)
    expected = float((losses * seen[0][1].weights).mean())
    assert Watch.losses["got"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="LabelSmoothing changes the batch for the loss"):
        fit([GradMatch(keep=0.4, **ON), LabelSmoothing(0.3)], algorithm_passes=None)


def test_two_selecting_algorithms_at_once_are_refused():
    with pytest.raises(ValueError, match="would both select"):
        fit([GradMatch(**ON), SelectiveBackprop()])
    fit([GradMatch(start=0.0, end=0.5), RandomBackprop(start=0.5, end=1.0)])


def test_an_interpolated_loss_is_refused():
    with pytest.raises(ValueError, match="interpolate_loss=False"):
        fit([GradMatch(**ON), MixUp(interpolate_loss=True)])
