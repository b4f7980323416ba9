"""Composer's EMA and SWA: they average the trajectory, and selection sees the weights in training."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import BATCHNORM, MLP, loader, make_trainer, record_selections
from composer import Callback
from composer.algorithms import EMA, SWA
from oracles import reference_selection

from composer_gradmatch import GradMatch, LossBackprop, select_first

# Said of every SWA.
pytestmark = pytest.mark.filterwarnings("ignore:SWA has known issues when resuming:UserWarning")

M, KEEP = 24, 0.5
ON = {"start": 0.0, "end": 1.0, "keep": KEEP, "interrupt": 0}


class Trajectory(Callback):
    """The model as each step starts from it and ends with it, before EMA puts its average there for a checkpoint."""

    def __init__(self):
        self.starts, self.ends = [], []

    def batch_start(self, state, logger):
        self.starts.append(copy.deepcopy(state.model))

    def batch_end(self, state, logger):
        self.ends.append({k: v.clone().double() for k, v in state.model.state_dict().items()})


def follow(case, selecting, others, data, **kwargs):
    """Two epochs of three steps: what was selected in each, and the trajectory."""
    seen, trajectory = record_selections(selecting), Trajectory()
    make_trainer(
        case.model(),
        loader(data, M),
        [selecting, *others],
        lr=0.5,
        max_duration="6ba",
        algorithm_passes=[select_first],
        callbacks=[trajectory],
        seed=1,
        **kwargs,
    ).fit()
    assert len(seen) == 6
    return [selection for _, selection in seen], trajectory


@pytest.mark.parametrize("algorithm_class", [GradMatch, LossBackprop])
@pytest.mark.parametrize("save_interval", ["1ba", "1ep"])
def test_ema_averages_the_trajectory_and_changes_none_of_it(algorithm_class, save_interval, tmp_path):
    """Each checkpoint leaves the average in the model until after the next selection, which must not see it."""
    data, ema = BATCHNORM.data(3 * M), EMA(half_life="2ba")
    saved = {"save_folder": str(tmp_path), "save_interval": save_interval}
    selections, trajectory = follow(BATCHNORM, algorithm_class(**ON), [ema], data, **saved)
    alone, trajectory_alone = follow(BATCHNORM, algorithm_class(**ON), [], data)
    for selection, expected in zip(selections, alone, strict=True):
        assert torch.equal(selection.indices, expected.indices)
        assert selection.weights is None or torch.equal(selection.weights, expected.weights)
    for end, expected in zip(trajectory.ends, trajectory_alone.ends, strict=True):
        assert all(torch.equal(end[key], expected[key]) for key in expected)
    average = trajectory.ends[0]
    for end in trajectory.ends[1:]:
        average = {key: value * 2**-0.5 + end[key] * (1 - 2**-0.5) for key, value in average.items()}
    # The last checkpoint has put the average into the model, buffers too.
    checkpoint = torch.load(tmp_path / "latest-rank0.pt", weights_only=False)["state"]["model"]
    for key, value in average.items():
        if value.numel() > 1:
            torch.testing.assert_close(checkpoint[key].double(), value, rtol=1e-4, atol=1e-6)


def test_ema_resumed_from_a_checkpoint_selects_by_the_weights_in_training(tmp_path):
    data, saved = MLP.data(3 * M), {"save_folder": str(tmp_path), "save_interval": "1ba"}
    whole, _ = follow(MLP, GradMatch(**ON), [EMA(half_life="2ba")], data, **saved, run_name="ema")
    selecting = GradMatch(**ON)
    seen = record_selections(selecting)
    resumed = make_trainer(
        *(MLP.model(seed=1), loader(data, M), [selecting, EMA(half_life="2ba")]),
        lr=0.5,
        max_duration="6ba",
        load_path=str(next(tmp_path.glob("ep1-ba4-*.pt"))),
    )
    resumed.fit()
    for (_, selection), expected in zip(seen, whole[4:], strict=True):
        assert torch.equal(selection.indices, expected.indices)
        assert torch.equal(selection.weights, expected.weights)


def test_swa_averages_the_trajectory_and_selection_follows_the_weights_it_leaves():
    data, swa = MLP.data(3 * M), SWA(swa_start="0.3dur", swa_end="0.6dur", update_interval="1ba")
    selections, trajectory = follow(MLP, GradMatch(**ON), [swa], data)
    _, alone = follow(MLP, GradMatch(**ON), [], data)
    average = {key: sum(end[key] for end in alone.ends[1:4]) / 3 for key in alone.ends[0]}
    for key, value in trajectory.ends[3].items():
        torch.testing.assert_close(value, average[key], rtol=1e-4, atol=1e-6)
    for i, (start, selection) in enumerate(zip(trajectory.starts, selections, strict=True)):
        rows = slice(i % 3 * M, (i % 3 + 1) * M)
        picks, weights = reference_selection(start.module, MLP.layer, *(t[rows] for t in data.tensors), KEEP)
        assert selection.indices.tolist() == picks.tolist()
        torch.testing.assert_close(selection.weights, torch.as_tensor(weights), rtol=1e-3, atol=1e-3)
