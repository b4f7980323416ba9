"""Runs of LLM Foundry that are resumed from a checkpoint go on as if they had not been stopped, bit for bit."""

from __future__ import annotations

import pytest
import torch
from foundry_files import STRATEGIES, config, launch, write_config

pytest.importorskip("llmfoundry")

DATA = {"gradmatch": "tokens"}


@pytest.fixture(scope="module", params=[1, 2])
def folder(files, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp(f"resumed{request.param}")
    for strategy, options in STRATEGIES.items():
        for name in ("a", "resumed"):
            resumed = {"load_path": str(folder / f"{strategy}-a/ep0-ba2-rank0.pt")} if name == "resumed" else {}
            values = config(files, "mpt", DATA.get(strategy, "chats"), {strategy: options}, request.param, **resumed)
            saved = {"save_folder": str(folder / f"{strategy}-{name}"), "save_interval": "2ba", "max_duration": "4ba"}
            write_config(folder / f"{strategy}-{name}.yaml", {**values, **saved})
    launch(folder, request.param)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_is_the_uninterrupted_one(folder, strategy):
    begun = torch.load(folder / f"{strategy}-a/ep0-ba2-rank0.pt", weights_only=False)["state"]
    one, other = (
        torch.load(folder / f"{strategy}-{name}/ep0-ba4-rank0.pt", weights_only=False)["state"]
        for name in ("a", "resumed")
    )
    assert not torch.equal(*(next(iter(state["model"].values())) for state in (begun, one))), "nothing was learned"
    for part in ("model", "optimizers"):
        flat = [dict(leaves(state[part])) for state in (one, other)]
        assert flat[0].keys() == flat[1].keys()
        assert [name for name in flat[0] if not torch.equal(flat[0][name], flat[1][name])] == []


def leaves(state, name=""):
    """The tensors of nested dicts, by name."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from leaves(value, f"{name}.{key}")
