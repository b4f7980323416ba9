"""What a step costs: the paper's model."""

from __future__ import annotations

from fractions import Fraction

import pytest

from composer_gradmatch.rules.cost import step_cost


@pytest.mark.parametrize(
    ("passes", "keep", "cost"),
    [
        (0, Fraction(1, 10), Fraction(1, 10)),
        (0, 1, 1),
        (2, Fraction(3, 10), Fraction(19, 30)),  # 0.633...
        (2, Fraction(2, 3), 1),  # Where a selection pass stops to pay (§2).
        (2, 1, Fraction(4, 3)),
        (1, Fraction(3, 10), Fraction(8, 15)),  # 0.533...
        (1, 1, 1),
    ],
)
def test_a_step_costs_what_the_papers_model_says(passes, keep, cost):
    assert step_cost(passes, float(keep)) == pytest.approx(float(cost))


@pytest.mark.parametrize(("passes", "cost"), [(0, 0.3), (1, 0.4 + 0.6 * 0.3), (2, 0.7)])
def test_the_share_of_the_forward_pass_can_be_a_measured_one(passes, cost):
    assert step_cost(passes, 0.3, 0.4) == pytest.approx(cost)


def test_another_number_of_passes_is_refused():
    with pytest.raises(ValueError, match="passes must be 0, 1 or 2, got 3"):
        step_cost(3, 0.3)
