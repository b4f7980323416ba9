"""Strategies are records: what one more of them changes on the command line, in tables and in figures."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from installing import install
from made_up_results import accuracy, costs, line
from matplotlib.colors import to_hex

from composer_gradmatch.rules.rule import Rule
from composer_gradmatch.rules.table import RULES
from composer_gradmatch.studies.__main__ import main
from composer_gradmatch.studies.accuracy import figures
from composer_gradmatch.studies.report import write_report
from composer_gradmatch.studies.strategies import (
    STRATEGIES,
    Strategy,
    all_strategies,
    in_order,
    strategy_entry,
    with_strategy,
)
from composer_gradmatch.train.config import ConfigError, load_config

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"
HALVES = Strategy("halves", "gradmatch", 1, "#123456", "p", {"ridge": 0.5, "reuse_activations": True})


def largest(candidates, m, *, smallest=False):
    return candidates.losses.topk(m, largest=not smallest).indices, None


PAPERS = ("gradmatch", "loss_backprop", "random_backprop")


@pytest.fixture
def papers_rules(monkeypatch):
    """No rule but the paper's; all in their order again after the test, and after what it adds to them is gone."""
    saved = dict(RULES)
    for name in saved.keys() - set(PAPERS):
        del RULES[name]
    yield
    RULES.clear()
    RULES.update(saved)


def test_the_papers_strategies():
    pairs = ["gradmatch_reuse", "loss_reuse"]
    names = ["gradmatch", "gradmatch_matched", "loss", "random", "selective_backprop", *pairs, "full"]
    assert [name for name, each in STRATEGIES.items() if not each.is_stored] == names
    assert list(STRATEGIES) == list(all_strategies())[: len(STRATEGIES)]
    costs = {name: STRATEGIES[name].cost(0.3) for name in names}
    two_passes = dict.fromkeys(("gradmatch", "gradmatch_matched", "loss", "selective_backprop"), 0.6333333)
    one_pass = dict.fromkeys(pairs, 0.5333333)
    assert costs == pytest.approx({**two_passes, **one_pass, "random": 0.3, "full": 1.0})


def test_stored_looks_cost_a_part_of_a_pass(monkeypatch):
    stored = [each for each in STRATEGIES.values() if each.is_stored]
    assert len(stored) == 9
    for each in stored:
        keep = {"full_trusted": 1.0, "infobatch_stored": 0.99, "kakurenbo_stored": 0.99}.get(each.name, 0.1)
        assert each.cost(0.1) == pytest.approx(1 / 15 + keep)
    (config,) = strategy_entry({}, "full_trusted", 0.1).values()
    assert config["keep"] == 1.0
    assert strategy_entry({}, "gradmatch_trusted", 0.1)["gradmatch"]["keep"] == 0.1


def test_each_of_our_strategies_has_a_colour_of_its_own():
    ours = [each for name, each in all_strategies().items() if not name.endswith("_reuse") or name in STRATEGIES]
    assert {each.algorithm for each in ours} == {*RULES, "selective_backprop", None}
    assert len({each.color for each in ours}) == len(ours)
    everything = all_strategies().values()
    assert len({(each.color, each.marker) for each in everything}) == len(everything)


def test_each_strategy_has_a_colour_and_a_marker_of_its_own(papers_rules, monkeypatch):
    for number in range(5):
        monkeypatch.setitem(RULES, f"rule{number}", Rule(largest, f"rule{number}", needs="losses"))
    strategies = all_strategies().values()
    assert len(strategies) == len(STRATEGIES) + 10
    assert len({(strategy.color, strategy.marker) for strategy in strategies}) == len(strategies)
    ours = STRATEGIES.values()
    assert len({strategy.color for strategy in ours}) == len({strategy.marker for strategy in ours}) == len(ours)
    assert all(to_hex(strategy.color) == strategy.color for strategy in strategies)


def test_a_rule_is_a_strategy_by_its_own_name(papers_rules, monkeypatch):
    monkeypatch.setitem(RULES, "top", Rule(largest, "top", needs="losses", color="#ff00ff", marker="d"))
    monkeypatch.setitem(RULES, "blind", Rule(lambda candidates, m: (range(m), None), "blind", needs="nothing"))
    found = all_strategies()
    assert list(found)[len(STRATEGIES) :] == ["blind", "top", "top_reuse"]
    assert (found["top"].color, found["top"].marker, found["top"].algorithm) == ("#ff00ff", "d", "top")
    assert [found[name].passes for name in ("blind", "top", "top_reuse")] == [0, 2, 1]
    assert found["top_reuse"].arguments == {"reuse_activations": True}
    alone = {name: (found[name].color, found[name].marker) for name in found}
    monkeypatch.setitem(RULES, "zzz", Rule(largest, "zzz"))
    again = all_strategies()
    assert {name: (again[name].color, again[name].marker) for name in found} == alone


def test_matched_weights_are_a_strategy_of_the_same_algorithm():
    base = load_config(DIGITS, ["algorithms.gradmatch={weights: normalized, ridge: 0.1}"])
    own = strategy_entry(base, "gradmatch_matched", 0.3)["gradmatch"]
    assert (own["weights"], own["ridge"], own["keep"]) == ("matched", 0.1, 0.3)


def test_a_rule_cannot_take_a_strategys_name(monkeypatch):
    monkeypatch.setitem(RULES, "full", Rule(largest, "full"))
    assert all_strategies()["full"] == STRATEGIES["full"]


def test_a_rows_arguments_are_those_that_are_trained_with(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "halves", HALVES)
    base = load_config(DIGITS, ["algorithms.gradmatch={keep: 0.9, start: 0.25, ridge: 0.1, selection_precision: fp32}"])
    own = strategy_entry(base, "halves", 0.2)["gradmatch"]
    assert (own["keep"], own["start"], own["ridge"], own["reuse_activations"]) == (0.2, 0.25, 0.5, True)
    assert "selection_precision" not in own
    assert with_strategy(base, "halves", 0.2)["algorithms"] == {"gradmatch": own}
    assert base["algorithms"]["gradmatch"]["keep"] == 0.9


def test_a_row_is_all_that_the_command_line_needs(monkeypatch, capsys, tmp_path):
    wrong = ["accuracy", str(DIGITS), "--out", str(tmp_path), "--strategies", "halvs"]
    with pytest.raises(SystemExit):
        main(wrong)
    assert "halves" not in capsys.readouterr().err
    monkeypatch.setitem(STRATEGIES, "halves", HALVES)
    with pytest.raises(SystemExit):
        main(wrong)
    assert "did you mean 'halves'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["accuracy", "--help"])
    assert "halves" in capsys.readouterr().out


def test_a_row_is_all_that_tables_and_figures_need(store, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "halves", HALVES)
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.setdefault(path.name, figure))
    for strategy, values in (("full", [0.9, 0.91]), ("random", [0.7, 0.72]), ("halves", [0.8, 0.81])):
        accuracy(store, strategy, 1.0 if strategy == "full" else 0.4, values)
    costs(store, full={1.0: 1.0}, random={0.4: 0.4}, halves={0.4: 0.62})
    text = write_report(store, "accuracy", "made up").read_text()
    assert line(text, "- **halves at keep 0.4** (62% of the full batch's time)")
    assert line(text, "| halves | 0.4 | 0.62 |").endswith("| 0.60 |")  # 1/3 + 2/3 of 0.4.
    panel = drawn["accuracy"].axes[0]
    (halves,) = (each for each in panel.lines if len(each.get_xdata()) and to_hex(each.get_color()) == HALVES.color)
    assert list(halves.get_ydata()) == pytest.approx([0.805])
    (legend,) = drawn["accuracy"].legends
    handles = dict(zip([text.get_text() for text in legend.get_texts()], legend.legend_handles, strict=True))
    assert list(handles) == ["random", "halves", "full"]
    assert (to_hex(handles["halves"].get_color()), handles["halves"].get_marker()) == (HALVES.color, HALVES.marker)


def test_results_of_a_strategy_that_is_gone_are_told_by_its_name():
    with pytest.raises(ConfigError, match="unknown strategy 'halves'"):
        in_order(["random", "halves"])


def test_a_rule_of_an_installed_package_goes_through_a_study(tmp_path, monkeypatch, capsys):
    package = tmp_path / "package"
    package.mkdir()
    source = """
from composer_gradmatch.rules.rule import Rule

def _largest(candidates, m):
    return candidates.losses.topk(m).indices, None

largest = Rule(_largest, needs="losses", weighs=False, color="#ff00ff", marker="d")
"""
    install(package, monkeypatch, source, "composer_gradmatch_rules", "top = their_package:largest")
    out = tmp_path / "out"
    options = ["--strategies", "random", "top", "top_reuse", "full", "--keep", "0.1", "--seeds", "1", "--rounds", "1"]
    assert main(["accuracy", str(DIGITS), "max_duration=1ep", *options, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "4 runs succeeded, 0 failed" in text
    costs = text[text.index("## Cost") :]
    assert line(costs, "| top |").endswith("| 0.43 |")
    assert line(costs, "| top_reuse |").endswith("| 0.40 |")
    rows = list(csv.DictReader((out / "results.csv").open()))
    kept = {row["strategy"]: int(row["samples_backpropagated"]) for row in rows}
    assert kept == {"random": 11 * 12, "top": 11 * 12, "top_reuse": 11 * 12, "full": 11 * 128}
    assert all((out / name).stat().st_size > 10_000 for name in ("accuracy.png", "accuracy_over_cost.png"))
