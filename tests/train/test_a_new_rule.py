"""A rule is one function and one row: then it trains from YAML, resumes, and stands in the studies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from composer_gradmatch import Rule
from composer_gradmatch.rules.table import RULES
from composer_gradmatch.studies.strategies import all_strategies, strategy_entry
from composer_gradmatch.train import train
from composer_gradmatch.train.config import ConfigError, load_config

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"


def largest_gradients(candidates, m, *, power: float = 1.0):
    """Picks the samples of the largest gradients, weighted by a power of their norms."""
    norms = candidates.gram.diagonal().sqrt()
    indices = norms.topk(m).indices
    weights = norms[indices] ** power
    return indices, weights / weights.mean()


@pytest.fixture
def new_rule(monkeypatch):
    rule = Rule(largest_gradients)
    monkeypatch.setitem(RULES, rule.name, rule)
    return rule


def config(folder, run_name, *overrides):
    own = "algorithms.largest_gradients={start: 0.0, end: 1.0, keep: 0.2, interrupt: 0, power: 0.5}"
    return load_config(
        str(DIGITS),
        [
            "algorithms.gradmatch=false",
            own,
            "progress_bar=false",
            "eval_loader=null",
            "max_duration=8ba",
            f"run_name={run_name}",
            f"save_folder={folder}/{{run_name}}",
            *overrides,
        ],
    )


@pytest.mark.parametrize("reuse", [False, True])
def test_it_trains_from_yaml_and_resumes_bit_for_bit(new_rule, tmp_path, reuse, capsys):
    one_pass = [f"algorithms.largest_gradients.reuse_activations={str(reuse).lower()}"]
    whole = train(config(tmp_path, "whole", *one_pass))
    (algorithm,) = (each for each in whole.state.algorithms if getattr(each, "rule", None) is not None)
    assert algorithm.rule.name == "largest_gradients"
    assert len(algorithm.last_selection.indices) == int(0.2 * 128)
    assert "selection steps" in capsys.readouterr().out
    interval = ["save_interval=5ba", "save_filename=ba{batch}.pt", "save_num_checkpoints_to_keep=-1"]
    train(config(tmp_path, "first", *one_pass, *interval))
    resumed = train(config(tmp_path, "second", *one_pass, f"load_path={tmp_path}/first/ba5.pt"))
    for key, value in whole.state.model.state_dict().items():
        assert torch.equal(resumed.state.model.state_dict()[key], value), key


def test_a_mistake_in_its_options_is_an_error_of_the_config(new_rule, tmp_path):
    with pytest.raises(ConfigError, match=r"algorithms.largest_gradients.power: expected a? ?(number|float)"):
        train(config(tmp_path, "wrong", "algorithms.largest_gradients.power=much"))
    with pytest.raises(ConfigError, match=r"algorithms.largest_gradients.powr: unknown key; .*'?power"):
        train(config(tmp_path, "wrong", "algorithms.largest_gradients.powr=1"))


def test_it_is_a_strategy_in_two_passes_and_in_one(new_rule, tmp_path):
    strategies = all_strategies()
    two, one = strategies["largest_gradients"], strategies["largest_gradients_reuse"]
    assert (two.passes, one.passes) == (2, 1)
    assert len({two.color, one.color} - {each.color for each in strategies.values() if each not in (two, one)}) == 2
    entry = strategy_entry(config(tmp_path, "any"), "largest_gradients_reuse", 0.3)
    assert entry["largest_gradients"] == {
        "start": 0.0,
        "end": 1.0,
        "interrupt": 0,
        "power": 0.5,
        "reuse_activations": True,
        "keep": 0.3,
    }
