"""With ``compile_config`` training steps of LLM Foundry stay compiled: what the table of the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from documents import PACKAGE
from foundry_files import STRATEGIES, config, loader, program, write_config

pytest.importorskip("llmfoundry")

COUNTING = Path(__file__).with_name("counting.py")
PAGE = (PACKAGE / "train/LLM_FOUNDRY.md").read_text()


@pytest.fixture(scope="module")
def counted(files, tmp_path_factory):
    """What was counted with each strategy; None: without one."""
    folder, found = tmp_path_factory.mktemp("compiled"), {}
    for strategy in (None, *STRATEGIES):
        options = {**STRATEGIES.get(strategy, {}), "keep": 0.4}  # Three picks: microbatches of two and of one.
        if strategy == "rule_backprop":
            options["rule"] = "grand"
        algorithms = {**({} if strategy is None else {strategy: options}), "count_graphs": {"file": f"{strategy}.json"}}
        values = config(files, "mpt", "chats", algorithms, 1, code_paths=[str(COUNTING)])
        values.update(max_duration="12ba", eval_interval="6ba", eval_loader=loader(files, "chats"))
        write_config(folder / f"{strategy}.yaml", {**values, "compile_config": {"backend": "counting"}})
        said = program(["llmfoundry", "train", f"{strategy}.yaml"], folder)
        assert "recompile_limit" not in said
        found[strategy] = json.loads((folder / f"{strategy}.json").read_text())
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_steps_stay_compiled(counted, strategy):
    """Each microbatch calls as many graphs as without selection."""
    assert set(counted[strategy]["calls"]) <= set(counted[None]["calls"])
    assert 0 not in counted[None]["calls"]


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_the_page_tells_how_many_graphs_a_function_has(counted, strategy):
    told = {}
    for names, number in re.findall(r"^\| (.*) \| (\d) \|$", PAGE, re.MULTILINE):
        told.update(dict.fromkeys(re.findall(r"`(\w+)`", names) or [None], int(number)))
    assert counted[strategy]["most"] == told[strategy]
