"""How well the picked samples' gradient matches the full data's, at weights that are held still (§5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from composer.core import Event, State
from composer.loggers import Logger
from torch import nn

from composer_gradmatch.forward.traceless import no_trace
from composer_gradmatch.last_layer import observe_output_layer, resolve_output_layer
from composer_gradmatch.studies.gradient_error.weights import trained
from composer_gradmatch.studies.interleave import Interleaved, Variant, fit_interleaved
from composer_gradmatch.studies.store import Run
from composer_gradmatch.studies.strategies import selecting_entry

__all__ = ["GradientErrors", "gradient_error"]


class GradientErrors(Interleaved):
    """Gathers the full-data gradient in the first epoch, then compares each variant's on the same minibatches.

    Args:
        variants (Sequence[Variant]): The first of them the full batch.
        config (dict[str, Any]): The study's config.
        minibatches (int): How many to compare on.
        mode (str): ``"train"`` for the gradients that training computes, with BatchNorm's statistics of the
            samples at hand; ``"eval"`` for those of the model in evaluation mode.
        output_layer (str, optional): Its dotted name; found by itself if None. Default: ``None``.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        config: dict[str, Any],
        minibatches: int,
        mode: Literal["train", "eval"],
        output_layer: str | None = None,
    ) -> None:
        super().__init__(variants, config)
        self.minibatches, self.mode, self.output_layer = minibatches, mode, output_layer
        self.rows: list[dict[str, Any]] = []
        self.samples = 0
        self._sum: torch.Tensor | None = None
        self._in_last_layer = torch.empty(0, dtype=torch.bool)
        self._turn, self._minibatch = 0, 0
        self._measuring = False

    def _find_last_layer(self, state: State) -> None:
        model: nn.Module = state.model
        with no_trace(model):
            if self.output_layer is not None:
                layer = resolve_output_layer(model, self.output_layer, state.batch)
            else:
                layer = observe_output_layer(model, state.batch)
        own = {id(parameter) for parameter in layer.parameters()}
        parts = [torch.full((p.numel(),), id(p) in own) for p in model.parameters() if p.requires_grad]
        self._in_last_layer = torch.cat(parts)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Runs the current variant on the held minibatch and reads its gradient: see :class:`.Algorithm`."""
        if event == Event.AFTER_DATALOADER:
            state.model.train(self.mode == "train")
            self._take_batch(state)
        super().apply(event, state, logger)
        if event == Event.AFTER_TRAIN_BATCH:
            gradient = _gradient(state.model)
            if state.timestamp.epoch == 0:
                weighted = gradient * self._num_samples
                self._sum = weighted if self._sum is None else self._sum + weighted
                self.samples += self._num_samples
            elif self._measuring:
                self._measure(gradient, self.count(state))
                if self._minibatch == self.minibatches:
                    state.stop_training()

    def _take_batch(self, state: State) -> None:
        state.batch = state.device.batch_to_device(state.batch)
        self._num_samples = self.count(state)
        if not len(self._in_last_layer):
            self._find_last_layer(state)
        self.current, self._measuring = self.variants[0], False
        if state.timestamp.epoch == 0:
            return
        if self._turn == 0:
            if self._num_samples < self.current.batch_size:
                return  # The epoch's shorter last batch.
            self._held = state.batch
        state.batch = self._held
        self.current, self._measuring = self.variants[self._turn], True

    def _measure(self, gradient: torch.Tensor, samples_kept: int) -> None:
        assert self._sum is not None
        full = self._sum / self.samples
        if self._turn == 0:
            self._minibatch_gradient = gradient
        last = self._in_last_layer.to(gradient.device)
        self.rows.append(
            {
                "strategy": self.current.strategy,
                "keep": self.current.keep,
                "minibatch": self._minibatch,
                "samples_kept": samples_kept,
                **_errors("", gradient, full),
                **_errors("last_layer_", gradient[last], full[last]),
                **_errors("minibatch_", gradient, self._minibatch_gradient),
                **_errors("last_layer_minibatch_", gradient[last], self._minibatch_gradient[last]),
            }
        )
        self._turn = (self._turn + 1) % len(self.variants)
        self._minibatch += self._turn == 0


def _gradient(model: nn.Module) -> torch.Tensor:
    parts = [
        torch.zeros(p.numel(), dtype=torch.float64, device=p.device) if p.grad is None else p.grad.double().flatten()
        for p in model.parameters()
        if p.requires_grad
    ]
    gradient = torch.cat(parts)
    if not gradient.isfinite().all():
        raise RuntimeError("A gradient is not finite. Look at the model's loss at these weights first.")
    return gradient


def _errors(prefix: str, estimate: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    squared = float((estimate - exact).square().sum())
    norm = float(exact.square().sum())
    norms = norm**0.5 * float(estimate.norm())
    return {
        f"{prefix}squared_error": squared,
        f"{prefix}relative_error": squared / norm if norm else float("nan"),
        f"{prefix}cosine": float(estimate @ exact) / norms if norms else float("nan"),
    }


def gradient_error(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Compares the run's variants: a row for each of them on each minibatch."""
    config, options, settings = run.config, run.options, run.settings
    size = config["global_train_batch_size"]
    variants = [Variant.build(config, strategy, keep, size) for strategy, keep in options["variants"]]
    own = (selecting_entry(config) or ("", {}))[1].get("output_layer")
    errors = GradientErrors(variants, config, options["minibatches"], settings["mode"], own)
    with TemporaryDirectory() as folder:
        checkpoint = settings["checkpoint"]
        if settings["after"]:
            trainer = trained(config, settings["after"], checkpoint)
            checkpoint = trainer.save_checkpoint(f"{folder}/trained.pt", weights_only=True)
            trainer.close()
        config = {**config, "train_loader": {**config["train_loader"], "drop_last": False, "shuffle": True}}
        config["optimizer"] = {"name": "sgd"}
        if checkpoint:
            config |= {"load_path": checkpoint, "load_weights_only": True}
        fit_interleaved(config, errors, size, 10**9)
    return errors.rows, {"samples": errors.samples}
