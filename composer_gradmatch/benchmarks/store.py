"""What a store of looks takes, and what half precision and random projection of H do to K and to the picks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from composer.core import State

from composer_gradmatch.benchmarks.looks import averages, compare_picks
from composer_gradmatch.benchmarks.watching import fit_watched
from composer_gradmatch.candidates.sample_store import SampleStore, Seen
from composer_gradmatch.candidates.source import Source
from composer_gradmatch.rules.candidates import Candidates

__all__ = ["measure_store", "through_a_store"]


def through_a_store(candidates: Candidates, width: int) -> tuple[Candidates, int]:
    """Puts a minibatch's candidates into a store that keeps so many numbers of each row of H, and takes them out.

    Args:
        candidates (Candidates): With gradients.
        width (int): At most D.

    Returns:
        tuple[Candidates, int]: What the store gives, with P as it was, and the store's bytes for each sample.
    """
    size = candidates.num_samples
    projects = width < candidates.inputs.shape[1]
    store = SampleStore(size, limit=2 * size * width if projects else float("inf"), keeps_grads=projects)
    store.put(Seen(torch.arange(size), candidates.losses, candidates.inputs, candidates.output_grads), 0)
    assert store.inputs is not None
    kept = store.inputs.float()
    grads = store.output_grads if store.output_grads is not None else candidates.output_grads
    return Candidates(size, losses=candidates.losses, inputs=kept, output_grads=grads), store.bytes // size


def measure_store(
    config: dict[str, Any], widths: Sequence[int], keep: float = 0.1, samples: int = 50_000, every: int = 10
) -> list[dict[str, Any]]:
    """Trains once by gradient matching, and in some steps compares picks from what a store would keep with its own.

    Args:
        config (dict[str, Any]): As :func:`.load_config` returns it.
        widths (Sequence[int]): Numbers kept of each row of H; D itself, in half precision, is always among the rows.
        keep (float, optional): m/M. Default: ``0.1``.
        samples (int, optional): Of the data set whose store's size is told. Default: ``50_000``.
        every (int, optional): Steps from one comparison to the next. Default: ``10``.

    Returns:
        list[dict[str, Any]]: A row for each width below D, and for D: bytes for each sample, MiB in all, and
        :func:`.averages` of :func:`.compare_picks` over the minibatches.
    """
    found: dict[int, list[dict[str, float]]] = {}
    size: dict[int, int] = {}

    def watch(state: State, source: Source, candidates: Candidates) -> None:
        full = candidates.inputs.shape[1]
        m = max(1, int(keep * candidates.num_samples))
        for width in sorted({*(each for each in widths if each < full), full}):
            kept, size[width] = through_a_store(candidates, width)
            if (compared := compare_picks(kept, candidates, m)) is not None:
                found.setdefault(width, []).append(compared)

    fit_watched(config, watch, every, lambda source: None, keep=keep)
    return [
        {
            "kept of a row": width,
            "D": max(found),
            "bytes a sample": size[width],
            f"MiB, N = {samples}": size[width] * samples / 2**20,
            **averages(rows),
            "minibatches": len(rows),
        }
        for width, rows in sorted(found.items())
    ]
