"""Two processes on the CPU (gloo), against the same step computed in one."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from cases import CONV
from launching import assert_step_is_the_weighted_mean, launch, read_ranks
from selecting import REPRESENTATIVES

from composer_gradmatch.rules.table import RULES

#: Algorithm, microbatch size, and the samples of rank 1 where it has fewer than rank 0. All in one launch.
CASES = [
    *[("gradmatch", microbatch_size, shorter) for microbatch_size, shorter in [(2, 0), (12, 0), (12, 2), (2, 5)]],
    *[(name, 2, 0) for name in RULES if name in REPRESENTATIVES and name != "gradmatch"],
]
OTHERS = [(name, 2, 0) for name in RULES if name not in REPRESENTATIVES]


def _launched(tmp_path_factory, cases):
    made = tmp_path_factory.mktemp("ddp")
    launch("worker.py", made, json.dumps(cases))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return _launched(tmp_path_factory, CASES)


@pytest.fixture(scope="module")
def folder_of_others(tmp_path_factory):
    return _launched(tmp_path_factory, OTHERS)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number])))
def test_a_ddp_step_is_the_weighted_mean_over_both_ranks_picks(folder, number):
    """Also where rank 1 has fewer samples than rank 0."""
    ranks = read_ranks(folder / str(number))
    assert_step_is_the_weighted_mean(ranks, CONV.model().module)
    if CASES[number][0] == "gradmatch":
        counts = [len(rank["weights"]) for rank in ranks]
        assert counts[0] != counts[1], "the ranks should have picked different numbers of samples"


def test_ranks_that_see_other_samples_decide_alike_whether_to_look(folder):
    one, other = (torch.load(folder / f"decided{rank}.pt") for rank in range(2))
    assert one == other
    assert len({step["is_on"] for step in one}) == 2, "it should have been on and off"


def test_all_ranks_store_what_each_has_seen_as_one_process_would(folder):
    one, other = (torch.load(folder / f"store{rank}.pt") for rank in range(2))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], equal_nan=True, rtol=0, atol=0)
    module, (inputs, targets) = CONV.model().module, CONV.data(48).tensors
    with torch.no_grad():
        torch.testing.assert_close(one["inputs"], module[:-1](inputs).half(), rtol=1e-2, atol=1e-3)
        losses = torch.nn.functional.cross_entropy(module(inputs), targets, reduction="none")
    torch.testing.assert_close(one["losses"], losses, rtol=1e-2, atol=1e-3)
    assert one["margins"].isfinite().all()
    assert set(one["stamps"].tolist()) <= {0, 1, 2}


def test_what_one_ranks_samples_show_of_the_model_is_so_for_all(folder):
    """Else one would keep P that the others compute, beside rows of H that are newer."""
    one, other = (torch.load(folder / f"disagreed{rank}.pt") for rank in range(2))
    assert "output_grads" in one
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], equal_nan=True, rtol=0, atol=0)


def test_the_log_of_who_was_picked_is_of_both_ranks(folder):
    trained = [torch.load(folder / f"trained{rank}.pt") for rank in range(2)]
    inputs = CONV.data(25).tensors[0][:, 0, 0, 0]
    for epoch in range(2):
        log = pd.read_parquet(folder / "selection_log" / f"ep{epoch + 1}.parquet")
        assert log["visits"].sum() == 26
        assert sorted(log["visits"])[-2:] == [1, 2]
        steps = [(values, weights) for rank in trained for at, values, weights in rank if at == epoch]
        values, weights = (torch.cat(parts) for parts in zip(*steps, strict=True))
        for number, value in enumerate(inputs):
            own = weights[values == value]
            assert log["picked"][number] == len(own)
            assert not len(own) or log["mean_weight"][number] == pytest.approx(float(own.mean()), rel=1e-5)


def test_the_first_rank_alone_draws_its_picks(folder):
    assert sorted(path.name for path in (folder / "selection_images0").iterdir()) == ["ep1-ba1.png", "ep2-ba4.png"]
    assert not (folder / "selection_images1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(OTHERS)), ids=lambda number: OTHERS[number][0])
def test_so_is_that_of_every_other_rule(folder_of_others, number):
    assert_step_is_the_weighted_mean(read_ranks(folder_of_others / str(number)), CONV.model().module)
