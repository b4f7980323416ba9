"""Records of results that no run has had."""

from __future__ import annotations

from composer_gradmatch.studies.store import Record, Run

PROVENANCE = {"machine": "a machine", "python": "3.11", "torch version": "2.7", "git revision": "abc"}


def add(store, kind, settings, *rows, error=""):
    run = Run(kind, settings, {})
    store.save(run, Record(kind, settings, {}, list(rows), error, PROVENANCE, 1.0))


def accuracy(store, strategy, keep, values, noise=0.0):
    for seed, value in enumerate(values):
        settings = {"strategy": strategy, "keep": keep, "seed": seed, "label_noise": noise, "batch_size": "fixed"}
        add(store, "accuracy", settings, {"best_accuracy": value, "last_accuracy": value - 0.01})


def costs(store, **ratios):
    rows = [
        {"strategy": name, "keep": keep, "measured": "step", "ratio": ratio, "batch_size": 128}
        for name, points in ratios.items()
        for keep, ratio in points.items()
        for _ in range(10)
    ]
    add(store, "step-time", {"variants": "all", "rounds": 10}, *rows)


def line(text, *starts):
    (found,) = (row for row in text.splitlines() if row.startswith(starts))
    return found
