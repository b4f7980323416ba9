"""The ways to look at a minibatch, what each costs, and with which of them a rule's error pays."""

from __future__ import annotations

from composer_gradmatch.rules.cost import break_even, step_cost
from composer_gradmatch.studies.strategies import strategy_named

__all__ = ["STORE_COST", "break_evens", "pays_with"]

#: What scores cost that are kept from earlier steps, in full steps.
STORE_COST = 0.02


def break_evens(share: float) -> dict[str, float]:
    """Gives r* of each way to look, the costliest first.

    Args:
        share (float): m/M.
    """
    costs = {
        "two passes": step_cost(2, share),
        "one pass": step_cost(1, share),
        "a store": STORE_COST + share,
    }
    return {name: break_even(cost, share) for name, cost in costs.items()}


def pays_with(strategy: str, share: float, relative_error: float, standard_error: float) -> str:
    """Names the costliest look with which a strategy's error is below that of random picks at the same cost.

    Args:
        strategy (str): Its name; one that looks at nothing has only random picks of the same number to beat.
        share (float): m/M.
        relative_error (float): r.
        standard_error (float): Of r; it must be below r* by two of them.

    Returns:
        str: The look; ``"–"`` where none pays, and nothing for random picks, which the others are held against.
    """
    if strategy == "random":
        return ""
    looks = break_evens(share) if strategy_named(strategy).passes else {"no look": 1.0}
    below = [name for name, limit in looks.items() if relative_error + 2 * standard_error < limit]
    return below[0] if below else "–"
