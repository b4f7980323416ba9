"""The gradient noise scale of a training on the full batch: how much averaging over samples a step still needs.

tr Σ/‖G‖², with G the mean gradient and Σ its covariance over samples (McCandlish et al., An Empirical Model of
Large-Batch Training, 2018), of the output layer's gradients: their products are K, whose off-diagonal has the mean ‖G‖²
and whose diagonal ‖G‖² + tr Σ, both without bias. Where it is far below the batch size, a part of the batch gives
nearly the same step, and random parts will do.
"""

from __future__ import annotations

from typing import Any

import torch

from composer_gradmatch.algorithms.rule_backprop import RuleBackprop
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import WholeBatch
from composer_gradmatch.rules.rule import Rule
from composer_gradmatch.studies.building import builder_of
from composer_gradmatch.studies.interleave import Interleaved, Variant
from composer_gradmatch.studies.store import Run
from composer_gradmatch.studies.strategies import selecting_entry

__all__ = ["NoiseScale", "noise_scale", "parts_of_gram"]


def parts_of_gram(gram: torch.Tensor) -> tuple[float, float]:
    """Gives unbiased estimates of ‖G‖² and tr Σ.

    Args:
        gram (torch.Tensor): K of at least two samples' gradients, shape (M, M).
    """
    samples = len(gram)
    diagonal = float(gram.diagonal().mean())
    off = (float(gram.sum()) - samples * diagonal) / (samples * (samples - 1))
    return off, diagonal - off


class NoiseScale:
    """A rule that trains every minibatch whole, and looks at its gradients first: see :class:`.Rule`.

    Args:
        found (list, optional): Gets ‖G‖² and tr Σ of each minibatch. Default: ``None``.
    """

    def __init__(self, *, found: list[tuple[float, float]] | None = None) -> None:
        self.found: list[tuple[float, float]] = [] if found is None else found

    def __call__(self, candidates: Candidates, m: int) -> WholeBatch:
        """Takes K."""
        if candidates.num_samples > 1:
            self.found.append(parts_of_gram(candidates.gram))
        return WholeBatch()

    def reset(self) -> None:
        """Forgets all."""
        self.found.clear()

    def state_dict(self) -> dict[str, Any]:
        """Tells what was found."""
        return {"found": list(self.found)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.found[:] = state["found"]


def noise_scale(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trains on the full batch and measures: a row for each quarter of the minibatches, by ratio of means."""
    config = run.config
    measured: list[tuple[float, float]] = []
    own = (selecting_entry(run.options["config"]) or ("", {}))[1]
    keys = {key: own[key] for key in ("input_key", "target_key", "output_layer") if key in own}
    rule = Rule(NoiseScale, weighs=False)
    options = {"found": measured}
    algorithm = RuleBackprop(rule, start=0.0, end=1.0, keep=0.5, interrupt=0, options=options, **keys)
    size = config["global_train_batch_size"]
    trainer = builder_of(config).trainer(config)
    trainer.state.algorithms.append(Interleaved([Variant("full", 1.0, size, algorithm, 1.0)], run.options["config"]))
    try:
        trainer.fit()
    finally:
        trainer.close()
    if len(measured) < 4:
        raise RuntimeError(f"{len(measured)} minibatches had gradients to measure; at least 4 are needed.")
    found = torch.tensor(measured, dtype=torch.float64)
    rows = []
    for quarter, part in enumerate(found.tensor_split(4), 1):
        squared_norm, trace = part.mean(0).tolist()
        scale = trace / squared_norm if squared_norm > 0 else None
        rows.append({"quarter": quarter, "squared_norm": squared_norm, "trace": trace, "noise_scale": scale})
    return rows, {"minibatches": len(measured)}
