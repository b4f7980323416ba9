"""The log of who was picked: against a plain count of what was trained on."""

from __future__ import annotations

import sys
from collections import defaultdict
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from cases import MLP, ON, make_trainer
from composer import Callback
from composer.utils import dist
from oracles import classifier_gradients
from torch.utils.data import DataLoader

from composer_gradmatch import GradMatch, LossBackprop, RuleBackprop, SelectionLog, number_samples, select_first
from composer_gradmatch.algorithms.pick_counts import PickCounts
from composer_gradmatch.rules.rule import Rule

N, M = 40, 10


class Plain(Callback):
    """Counts by the rows that the step really trains on, which are told apart by their inputs."""

    def __init__(self, data, algorithm):
        self.number = {tuple(row.tolist()): i for i, row in enumerate(data.tensors[0])}
        assert len(self.number) == N
        self.algorithm, self.epochs, self.step = algorithm, [], 0

    def epoch_start(self, state, logger):
        self.epochs.append(defaultdict(list))

    def batch_start(self, state, logger):
        numbers = [self.number[tuple(row.tolist())] for row in state.batch[0]]
        picks = self.algorithm.last_selection
        selected = len(numbers) < M
        weights = picks.weights.tolist() if selected and picks.weights is not None else [1.0] * len(numbers)
        for number, weight in zip(numbers, weights, strict=True):
            self.epochs[-1][number].append(weight)


def make(algorithm, folder=None, data=None, max_duration="2ep", seed=0, **kwargs):
    numbered = number_samples(MLP.data(N) if data is None else data)
    train = DataLoader(
        numbered, M, sampler=dist.get_sampler(numbered, shuffle=True), collate_fn=numbered.collate_fn, drop_last=False
    )
    log = SelectionLog(None if folder is None else str(folder))
    callbacks = [log, *kwargs.pop("callbacks", [])]
    return make_trainer(
        kwargs.pop("model", None) or MLP.model(),
        train,
        [algorithm],
        algorithm_passes=[select_first],
        callbacks=callbacks,
        max_duration=max_duration,
        seed=seed,
        **kwargs,
    )


def read(folder, epoch):
    return pd.read_parquet(folder / f"ep{epoch}.parquet")


@pytest.mark.parametrize(
    "algorithm_of",
    [
        partial(GradMatch, weights="matched", keep=0.4),
        partial(LossBackprop, keep=0.4),
        partial(RuleBackprop, "infobatch", keep=0.8),
    ],
    ids=["gradmatch", "loss_backprop", "infobatch"],
)
def test_counts_are_those_of_what_was_trained_on(algorithm_of, tmp_path):
    """Every third batch is trained whole, and so are the first and the last epoch."""
    algorithm = algorithm_of(start=0.25, end=0.75, interrupt=3, refresh="1ep")
    data = MLP.data(N)
    plain = Plain(data, algorithm)
    make(algorithm, tmp_path, data, "4ep", callbacks=[plain], device_train_microbatch_size=3).fit()
    assert len(plain.epochs[1]) < N == len(plain.epochs[0]), "it should have left some out, but not at first"
    for epoch, weights in enumerate(plain.epochs, 1):
        log = read(tmp_path, epoch)
        assert (log["epoch"] == epoch).all()
        assert log["sample"].tolist() == list(range(N))
        assert (log["visits"] == 1).all()
        assert log["picked"].tolist() == [len(weights[i]) for i in range(N)]
        expected = [np.mean(weights[i]) if weights[i] else np.nan for i in range(N)]
        np.testing.assert_allclose(log["mean_weight"], expected, rtol=1e-6)
    assert "look" not in vars(algorithm.selector.store), "the algorithm is left as it was"


def test_losses_and_norms_are_those_that_the_rule_saw(tmp_path):
    data, model = MLP.data(N), MLP.model()
    inputs, targets = data.tensors
    norms = np.linalg.norm(classifier_gradients(model.module, MLP.layer, inputs, targets), axis=1)
    losses = F.cross_entropy(model.module(inputs), targets, reduction="none").detach().numpy()
    make(GradMatch(**ON, keep=0.3, refresh="1ep"), tmp_path, data, model=model, lr=0.0, max_duration="3ba").fit()
    log = read(tmp_path, 1)  # Of an epoch that was only begun.
    seen = (log["visits"] == 1).to_numpy()
    assert seen.sum() == 3 * M
    np.testing.assert_allclose(log["loss"][seen], losses[seen], rtol=1e-5)
    np.testing.assert_allclose(log["gradient_norm"][seen], norms[seen], rtol=1e-4)
    assert log[~seen][["loss", "gradient_norm", "mean_weight"]].isna().all(axis=None)


def test_a_rule_of_losses_has_no_norms_and_suspects_have_their_stored_loss(tmp_path):
    data = MLP.data(N)
    make(LossBackprop(**ON, keep=0.3, refresh="5ep"), tmp_path / "loss", data).fit()
    log = read(tmp_path / "loss", 2)
    assert log["gradient_norm"].isna().all()
    assert log["loss"].notna().all()
    suspects = {"margin": -0.99, "after": "0ba"}
    algorithm = GradMatch(**ON, keep=0.3, refresh="5ep", suspects=suspects)
    make(algorithm, tmp_path / "suspects", data, lr=0.0).fit()
    log = read(tmp_path / "suspects", 2)
    assert (log["picked"] == 1).all(), "all are suspects, so that minibatches are trained whole"
    assert log["gradient_norm"].isna().all()
    losses = F.cross_entropy(MLP.model().module(data.tensors[0]), data.tensors[1], reduction="none").detach()
    np.testing.assert_allclose(log["loss"], losses, rtol=1e-4)


def weightless(candidates, m):
    return torch.arange(m), torch.tensor([0.0] + [m / (m - 1)] * (m - 1))


def test_a_sample_of_weight_zero_was_not_picked(tmp_path):
    make(RuleBackprop(Rule(weightless), **ON, keep=0.4, refresh="1ep"), tmp_path, max_duration="1ep").fit()
    log = read(tmp_path, 1)
    assert log["picked"].sum() == N // M * 3
    assert log["mean_weight"].dropna().tolist() == pytest.approx([4 / 3] * 12)


def test_a_run_resumed_in_mid_epoch_writes_what_the_uninterrupted_one_does(tmp_path):
    """And of the epochs that it goes back behind no file is left."""

    def run(folder, load_path=None, max_duration="3ep"):
        make(
            GradMatch(**ON, keep=0.3, refresh="2ep"),
            None,
            max_duration=max_duration,
            run_name="picks",
            save_folder=str(folder),
            save_interval="1ba",
            save_num_checkpoints_to_keep=-1,
            load_path=load_path,
        ).fit()
        return {path.name: pd.read_parquet(path) for path in (folder / "selection_log").iterdir()}

    whole = run(tmp_path / "whole")
    assert sorted(whole) == ["ep1.parquet", "ep2.parquet", "ep3.parquet"]
    resumed = tmp_path / "resumed" / "selection_log"
    resumed.mkdir(parents=True)
    (resumed / "ep9.parquet").touch()
    (resumed / "ep1.parquet").write_bytes((tmp_path / "whole" / "selection_log" / "ep1.parquet").read_bytes())
    again = run(tmp_path / "resumed", str(next((tmp_path / "whole").glob("ep1-ba6-*.pt"))))
    assert again.keys() == whole.keys()
    for name, log in whole.items():
        pd.testing.assert_frame_equal(log, again[name])


def test_ranks_add_up_and_the_latest_value_is_known():
    one, other = PickCounts(4), PickCounts(4)
    one.see_step(np.array([0, 1, 1]), np.array([0, 2]), np.array([0.5, 2.0]))
    one.see_values(np.array([0, 1]), np.array([3.0, np.inf]), None)
    other.see_step(np.array([1, 2]), None, None)
    other.see_values(np.array([1, 2]), np.array([5.0, 6.0]), np.array([7.0, np.nan]))
    other.known["loss"][3] = one.known["loss"][3] = 9.0
    whole = one.merged([one.of_epoch(), other.of_epoch()])
    assert whole.visits.tolist() == [1, 3, 1, 0]
    assert whole.picked.tolist() == [1, 2, 1, 0]
    assert whole.weights.tolist() == [0.5, 3.0, 1.0, 0.0]
    assert whole.latest()["loss"].tolist() == [3.0, 5.0, 6.0, 9.0]
    np.testing.assert_array_equal(whole.latest()["gradient_norm"], [np.nan, 7.0, np.nan, np.nan])
    assert one.visits.tolist() == [1, 2, 0, 0], "a rank's own counts go on"
    again = [PickCounts.of_state(whole.state_dict(), with_epoch=rank == 0).of_epoch() for rank in range(2)]
    assert PickCounts(4).merged(again).visits.tolist() == whole.visits.tolist()


def test_what_it_cannot_do_without_is_told(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"no sample numbers to count by.*refresh='5ep'"):
        make(GradMatch(**ON, keep=0.3), tmp_path).fit()
    algorithm = GradMatch(**ON, keep=0.3, refresh="1ep")
    with pytest.raises(ValueError, match=r"no local one \(save_folder\).*folder="):
        make(algorithm).fit()
    assert "look" not in vars(algorithm.selector.store)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'composer-gradmatch\[studies\]'"):
        SelectionLog()
