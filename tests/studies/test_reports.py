"""Summaries and figures of made-up results: the words must follow the numbers."""

from __future__ import annotations

from made_up_results import accuracy, add, costs, line

from composer_gradmatch.studies.report import write_report
from composer_gradmatch.studies.step_time.timer import PARTS


def test_better_at_equal_keep_can_be_worse_at_equal_cost(store):
    accuracy(store, "full", 1.0, [0.95, 0.951, 0.949])
    accuracy(store, "random", 0.1, [0.80, 0.801, 0.799])
    accuracy(store, "random", 0.5, [0.94, 0.941, 0.939])
    accuracy(store, "gradmatch", 0.1, [0.85, 0.852, 0.849])
    costs(store, full={1.0: 1.0}, random={0.1: 0.1, 0.5: 0.5}, gradmatch={0.1: 0.45})
    text = write_report(store, "accuracy", "made up").read_text()
    verdict = line(text, "- **gradmatch at keep 0.1**")
    assert "45% of the full batch's time" in verdict
    assert "best epoch: better (+0.0503) at equal keep, worse (-0.0722) at equal cost" in verdict
    assert "3 seeds" in text
    assert "can tell very little" in text
    assert "0.8503 (0.8490 to 0.8520)" in text
    for name in ("accuracy.png", "accuracy.pdf", "accuracy_over_cost.png", "results.csv", "costs.csv"):
        assert (store.folder / name).stat().st_size > 100


def test_a_cheaper_random_that_is_as_good_is_named(store):
    accuracy(store, "full", 1.0, [0.7, 0.71, 0.69])
    accuracy(store, "random", 0.1, [0.90, 0.91, 0.92])
    accuracy(store, "gradmatch", 0.1, [0.85, 0.86, 0.88])
    accuracy(store, "loss", 0.1, [0.95, 0.96, 0.98])
    costs(store, full={1.0: 1.0}, random={0.1: 0.15}, gradmatch={0.1: 0.45}, loss={0.1: 0.4})
    text = write_report(store, "accuracy", "made up").read_text()
    assert "Random at keep 0.1 was at least as accurate" in line(text, "- **gradmatch")
    assert "for 15% of it" in line(text, "- **gradmatch")
    assert "Random at keep" not in line(text, "- **loss")


def test_a_difference_within_the_noise_is_not_distinguishable(store):
    accuracy(store, "random", 0.1, [0.80, 0.85, 0.78, 0.82, 0.81])
    accuracy(store, "loss", 0.1, [0.82, 0.79, 0.80, 0.84, 0.79])
    text = write_report(store, "accuracy", "made up").read_text()
    verdict = line(text, "- **loss at keep 0.1** (cost not measured)")
    assert "not distinguishable" in verdict
    assert "nothing to compare with at equal cost" in verdict
    assert "can tell very little" not in text


def test_one_seed_gives_no_verdict(store):
    accuracy(store, "random", 0.1, [0.5])
    accuracy(store, "gradmatch", 0.1, [0.9])
    text = write_report(store, "accuracy", "made up").read_text()
    assert "One seed tells nothing" in text
    assert "better" not in line(text, "- **gradmatch")


def test_failed_runs_are_named_and_the_rest_reported(store):
    accuracy(store, "random", 0.1, [0.5, 0.6])
    settings = {"strategy": "gradmatch", "keep": 0.1, "seed": 0, "label_noise": 0.0, "batch_size": "fixed"}
    add(store, "accuracy", settings, error="ValueError: no\nmore")
    text = write_report(store, "accuracy", "made up").read_text()
    assert "2 runs succeeded, 1 failed" in text
    assert "- strategy gradmatch, keep 0.1, seed 0, label_noise 0.0, batch_size fixed: ValueError: no" in text
    assert "no run" not in text


def test_without_a_success_every_report_says_so(store):
    for kind in ("accuracy", "learning-rate", "gradient-error", "step-time"):
        add(store, kind, {"strategy": "random", "seed": 0}, error="ValueError: no")
        text = write_report(store, kind, "made up").read_text()
        assert "0 runs succeeded, 1 failed" in text
        assert "nothing to compare" in text


def test_learning_rates_are_compared_each_at_its_best(store):
    shape = {"gradmatch": {0.5: 0.80, 1.0: 0.90, 2.0: 0.70}, "random": {0.5: 0.95, 1.0: 0.85, 2.0: 0.60}}
    for strategy, factors in shape.items():
        for factor, mean in factors.items():
            for seed, shift in enumerate((0.0, 0.001, -0.002)):
                settings = {"strategy": strategy, "keep": 0.3, "factor": factor, "seed": seed, "label_noise": 0.0}
                value = mean + shift * (1 if strategy == "random" else 0.5)
                add(store, "learning-rate", settings, {"best_accuracy": value, "last_accuracy": value})
    text = write_report(store, "learning-rate", "made up").read_text()
    row = [cell.strip() for cell in line(text, "| gradmatch | 0.3 | 1 | -").split("|")]
    assert row[3] == "1"
    assert row[5] == "worse"
    assert row[7] == "better"
    assert line(text, "| random | 0.3 | 0.5 (edge of the grid) |  |")
    assert (store.folder / "learning_rate.png").stat().st_size > 10_000


def test_gradient_errors_are_better_when_smaller(store):
    kinds = ("", "last_layer_", "minibatch_", "last_layer_minibatch_")
    for seed in range(3):
        rows = []
        for minibatch in range(4):
            for strategy, size in (("full", 0.1), ("gradmatch", 0.5), ("random", 1.0), ("loss", 3.0)):
                error = size * (1 + 0.01 * minibatch + 0.02 * seed)
                row = {"strategy": strategy, "keep": 1.0 if strategy == "full" else 0.1, "minibatch": minibatch}
                for kind in kinds:
                    row |= {f"{kind}squared_error": error, f"{kind}relative_error": error / 2, f"{kind}cosine": 0.5}
                rows.append(row)
        settings = {"seed": seed, "label_noise": 0.0, "variants": "all", "minibatches": 4, "mode": "train"}
        add(store, "gradient-error", {**settings, "against": "data", "after": 0, "checkpoint": ""}, *rows)
    text = write_report(store, "gradient-error", "made up").read_text()
    assert line(text, "| gradmatch | 0.1 | 0.5").endswith("| 0.50 | 100% | better |")
    assert line(text, "| loss | 0.1 | 3.").endswith("| 3.00 | 0% | worse |")
    assert (store.folder / "gradient_error.pdf").read_bytes().startswith(b"%PDF")


def test_step_times_are_held_against_the_shares_of_the_full_batchs_own_step(store):
    full = {"training_forward": 0.4, "training_backward": 0.4, "selection_rest": 0.05, "rest": 0.15}
    rows = []
    for strategy, keep, size in (
        ("full", 1.0, 64),
        ("gradmatch", 0.5, 64),
        ("gradmatch_reuse", 0.5, 64),
        ("random", 0.25, 256),
    ):
        row = {"strategy": strategy, "keep": keep, "batch_size": size, "ratio": 0.9, "seconds": 1.0}
        # A selecting step's own parts are not what the column is made of.
        own = full if strategy == "full" else dict.fromkeys(full, 0.25)
        parts = {f"{part}_seconds": own.get(part, 0.0) for part in PARTS}
        rows += [{**row, "measured": "step"}] * 3 + [{**row, "measured": "parts", **parts}] * 3
    add(store, "step-time", {"variants": "all", "rounds": 3, "synthetic": False}, *rows)
    text = write_report(store, "step-time", "made up").read_text()
    assert "0.40 forward, 0.40 backward and 0.20 for the rest" in text
    assert line(text, "| strategy | keep | ms").endswith("| cost model | own shares |")
    assert line(text, "| full | 1 | 1000.0").endswith("| 1.00 | 1.00 |")
    assert line(text, "| gradmatch | 0.5 | 1000.0").endswith("| 0.83 | 1.00 |")
    assert line(text, "| gradmatch_reuse | 0.5 | 1000.0").endswith("| 0.67 | 0.80 |")
    # Four minibatches' samples share one step's rest.
    assert line(text, "| random | 0.25 | 1000.0").endswith("| 0.25 | 0.25 |")
