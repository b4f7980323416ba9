"""Contestants timed side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["interleaved_medians", "multiply_adds_per_second"]


def interleaved_medians(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 5, synchronize: bool = False
) -> dict[str, float]:
    """Measures the median seconds of a call of each contestant, measured in turns.

    In a turn a contestant is called ``calls`` times after a call that does not count: the threads of the contestant
    before may still be spinning, and the caches are its own.

    Args:
        contestants (Mapping[str, Callable]): Name → what to time.
        rounds (int): Turns of each contestant.
        calls (int, optional): Timed calls in a turn. Default: ``5``.
        synchronize (bool, optional): Whether to wait for the GPU at both ends of a call. Default: ``False``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            for i in range(calls + 1):
                if synchronize:
                    torch.cuda.synchronize()
                started = time.perf_counter()
                call()
                if synchronize:
                    torch.cuda.synchronize()
                if i:
                    seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def multiply_adds_per_second(size: int = 1024) -> float:
    """Tells what numpy's product of two float64 matrices reaches, with all of its threads."""
    a, b = np.random.default_rng(0).standard_normal((2, size, size))
    return size**3 / interleaved_medians({"product": lambda: a @ b}, rounds=5)["product"]
