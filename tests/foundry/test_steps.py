"""LLM Foundry's training, by each strategy of its ``algorithms:`` block, against float64 references of each step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from foundry_files import BATCH, KEEP, STRATEGIES, config, launch, write_config
from foundry_reference import matched, num_samples, num_tokens, sample_losses, step_gradients

pytest.importorskip("llmfoundry")
# What LLM Foundry's models remark on, in the reference's passes, is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DATA = ("chats", "packed chats", "tokens")
EACH = [("mpt", "chats"), ("untied mpt", "packed chats"), ("llama", "tokens")]
#: Number of processes, strategy, model, data, and whether the model is compiled.
RUNS = [
    *[(1, "gradmatch", model, data, False) for model in ("mpt", "untied mpt", "llama") for data in DATA],
    *[(1, "gradmatch", model, "chats", True) for model in ("mpt", "llama")],
    *[(1, name, model, data, False) for name in list(STRATEGIES)[1:] for model, data in EACH],
    (2, "gradmatch", "mpt", "chats", True),
    *[(2, name, model, data, False) for name in STRATEGIES for model, data in EACH],
]
RECORDER = Path(__file__).with_name("recorder.py")


def name_of(run):
    return "-".join(map(str, run)).replace(" ", "_")


@pytest.fixture(scope="module")
def folders(files, tmp_path_factory):
    made = {}
    for world in (1, 2):
        folder = made[world] = tmp_path_factory.mktemp(f"on{world}")
        for run in RUNS:
            if run[0] == world:
                _, strategy, model, data, compiled = run
                algorithms = {strategy: STRATEGIES[strategy], "recorder": {"folder": str(folder / name_of(run))}}
                more = {"compile_config": {"backend": "eager"}} if compiled else {}
                values = config(files, model, data, algorithms, world, **more, code_paths=[str(RECORDER)])
                write_config(folder / f"{name_of(run)}.yaml", values)
        # With compile_config, too.
        assert "recompile_limit" not in launch(folder, world)
    return made


@pytest.fixture
def steps(folders, request):
    """For each step of a run, what its ranks have recorded."""
    run = request.param
    ranks = [
        torch.load(folders[run[0]] / name_of(run) / f"rank{rank}.pt", weights_only=False) for rank in range(run[0])
    ]
    return list(zip(*ranks, strict=True))


every_run = pytest.mark.parametrize("steps", RUNS, ids=name_of, indirect=True)


@every_run
def test_a_step_is_the_weighted_mean_over_the_tokens_of_all_picks(steps):
    """Of all ranks; in microbatches, which have more or fewer tokens."""
    assert len(steps) == 2
    for records in steps:
        expected = step_gradients(records)
        for record in records:
            flat = [
                torch.cat([each[name].double().flatten() for name in expected])
                for each in (expected, record["gradients"])
            ]
            assert (flat[0] - flat[1]).norm() <= 5e-6 * flat[0].norm()


@every_run
def test_picks_are_so_many_of_the_minibatch(steps):
    for records in steps:
        for record in records:
            picks = record["indices"].tolist()
            assert num_samples(record) == BATCH
            assert len(set(picks)) == len(picks)
            # Steps of importance_backprop that do not look train more, at the same cost.
            assert len(picks) in (BATCH * KEEP, int(BATCH * (KEEP + 1 / 3)))


@pytest.mark.parametrize("steps", [run for run in RUNS if run[1] == "gradmatch"], ids=name_of, indirect=True)
def test_matching_picks_and_weighs_as_the_reference(steps):
    compared = 0
    for records in steps:
        for record in records:
            picks, weights, margin = matched(record, KEEP)
            if margin > 1e-4:  # Else float32's rounding may decide.
                assert record["indices"].tolist() == picks.tolist()
                np.testing.assert_allclose(record["sample_weights"].double().numpy(), weights, atol=1e-5)
                compared += 1
    assert compared


@pytest.mark.parametrize("steps", [run for run in RUNS if run[1] == "rule_backprop"], ids=name_of, indirect=True)
def test_a_rule_by_its_name_picks_the_largest_losses(steps):
    """A sample's loss is the sum over its tokens."""
    for records in steps:
        for record in records:
            order = np.argsort(sample_losses(record))[::-1]
            assert sorted(record["indices"].tolist()) == sorted(order[: int(BATCH * KEEP)].tolist())
            assert record["sample_weights"] is None


def test_finetuning_samples_have_tokens_of_many_numbers(folders):
    """Or the tests above would not tell a mean over tokens from one over samples."""
    (first, _) = torch.load(folders[1] / name_of(RUNS[0]) / "rank0.pt", weights_only=False)
    assert len({num_tokens(first, i) for i in range(BATCH)}) > 3
