"""A model sharded by torch's ``fully_shard`` on two processes, against the same step computed in one."""

from __future__ import annotations

import pytest
import torch
from cases import CONV
from launching import run_on_two_ranks
from oracles import reference_selection, weighted_gradient

WORKER = "sharded_worker.py"


def steps_over_gradients(ranks):
    """The step of each parameter on each rank, and the gradient of the weighted mean over both ranks' picks."""
    picked = []
    for rank in ranks:
        weights = torch.ones(len(rank["indices"])) if rank["weights"] is None else rank["weights"]
        picked.append((*(tensor[rank["indices"]] for tensor in rank["batch"]), weights))
    module = CONV.model().module
    gradients = weighted_gradient(module, *(torch.cat(parts) for parts in zip(*picked, strict=True)))
    before = list(module.parameters())
    gradient = torch.cat([g.flatten() for g in gradients])
    steps = [
        torch.cat([(a - b.detach()).double().flatten() for a, b in zip(rank["parameters"], before, strict=True)])
        for rank in ranks
    ]
    return steps, gradient


@pytest.fixture(scope="module")
def full_step(tmp_path_factory):
    """How long a step is without selection: on gloo, torch 2.7 adds up the ranks' gradients, where NCCL averages."""
    steps, gradient = steps_over_gradients(run_on_two_ranks(WORKER, tmp_path_factory.mktemp("full"), "full", 7, 12))
    factor = steps[0].norm() / gradient.norm()
    assert min((factor - 0.1).abs(), (factor - 0.2).abs()) < 1e-4
    return factor


@pytest.mark.parametrize(("algorithm", "second"), [("gradmatch", 7), ("loss_backprop", 7), ("gradmatch", 1)])
def test_a_sharded_step_is_the_weighted_mean_over_both_ranks_picks(tmp_path, algorithm, second, full_step):
    ranks = run_on_two_ranks(WORKER, tmp_path, algorithm, second, 12)
    assert [len(rank["batch"][0]) for rank in ranks] == [12, second]
    if algorithm == "gradmatch":
        for rank in ranks:
            picks, expected = reference_selection(CONV.model().module, CONV.layer, *rank["batch"], 0.5)
            assert rank["indices"].tolist() == picks.tolist()
            torch.testing.assert_close(rank["weights"], torch.as_tensor(expected), rtol=1e-4, atol=1e-5)
    steps, gradient = steps_over_gradients(ranks)
    for step in steps:
        assert (step + full_step * gradient).norm() <= 1e-4 * step.norm()


def test_picks_that_make_unequal_numbers_of_microbatches_are_filled_up(tmp_path, full_step):
    """Each training microbatch gathers parameters on all ranks: with fewer on one of them the other would wait."""
    ranks = run_on_two_ranks(WORKER, tmp_path, "gradmatch", 12, 4)
    assert [rank["whole"] for rank in ranks] == [[0], [0]]
    assert len(ranks[0]["indices"]) <= 4 < len(ranks[1]["indices"])
    steps, gradient = steps_over_gradients(ranks)
    for step in steps:
        assert (step + full_step * gradient).norm() <= 1e-4 * step.norm()
    # Looks are forward passes of both ranks, also where but one has samples that are due.
    one, other = (rank["stored"] for rank in ranks)
    assert one["looked"] == [12, 0, 1, 0]
    assert other["looked"] == [12, 0, 12, 0]
    for name in one["store"]:
        torch.testing.assert_close(one["store"][name], other["store"][name], equal_nan=True, rtol=0, atol=0)
