"""Every change of a good config is refused with one message that names the key, or runs."""

from __future__ import annotations

import random

import pytest
from config_fuzz import GOOD, Change, Outcome, changed, complaint, draw, run

CHANGES = 320


def test_the_config_that_is_changed_runs(tmp_path):
    assert run(GOOD, tmp_path / "run") == Outcome(0, "")


@pytest.mark.parametrize("seed", range(8))
def test_changes_are_refused_by_name_or_run(seed, tmp_path):
    rng = random.Random(seed)
    codes = []
    for number in range(CHANGES // 8):
        change = draw(rng)
        outcome = run(changed(change), tmp_path / str(number))
        assert complaint(change, outcome) is None, change
        codes.append(outcome.code)
    assert {0, 2} == set(codes)


@pytest.mark.parametrize(
    ("outcome", "found"),
    [
        (Outcome(None, "ValueError: no"), "ValueError: no"),
        (Outcome(1, "no"), "no"),
        (Outcome(2, "c.yaml: the config cannot be run:\nsomething is wrong"), "does not name the key"),
        (Outcome(2, "c.yaml: the config cannot be run:\nseed: expected"), None),
    ],
)
def test_this_test_can_fail(outcome, found):
    complained = complaint(Change(("seed",), -1, {}), outcome)
    assert complained is None if found is None else found in complained
