"""The store of a run: made for its output layer, in its checkpoints, and begun anew where it is not what is needed."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from composer.core import State

from composer_gradmatch.candidates.output_layer_again import OutputLayerAgain
from composer_gradmatch.candidates.sample_store import SampleStore
from composer_gradmatch.candidates.suspects import Suspects
from composer_gradmatch.candidates.watched_layer import WatchedLayer
from composer_gradmatch.forward.selection_pass import SelectionPass
from composer_gradmatch.last_layer import OutputLayer

__all__ = ["StoreOfRun"]

log = logging.getLogger(__name__)

#: The most bytes of a store that go into a checkpoint.
CHECKPOINT_LIMIT = 256 * 2**20


class StoreOfRun:
    """Makes the store, and knows what it keeps.

    Args:
        selection_pass (SelectionPass): Warns.
        layer (WatchedLayer, optional): The output layer; None for losses alone.
        again (OutputLayerAgain): Tells whether P can be computed from H.
        unit (str): Of the times of looks.
        limit (float): The most bytes for rows of H.
        device (str): ``"cpu"``, or ``"gpu"`` for the run's device.
        suspects (Suspects, optional): Whom to leave out.
    """

    def __init__(
        self,
        selection_pass: SelectionPass,
        layer: WatchedLayer | None,
        again: OutputLayerAgain,
        unit: str,
        limit: float,
        device: Literal["cpu", "gpu"],
        suspects: Suspects | None,
    ) -> None:
        self.selection_pass, self.layer, self.again, self.suspects = selection_pass, layer, again, suspects
        self.unit, self.limit, self.device = unit, limit, device
        self.reset()

    def reset(self) -> None:
        """Forgets what belongs to one Trainer."""
        self.store: SampleStore | None = None
        #: N.
        self.size = 0
        #: Whether P and losses are computed from H; not known before the first batch.
        self.computes = False
        self._restored: dict[str, Any] = {}
        self._said = False
        self.reset_fit()

    def reset_fit(self) -> None:
        """Forgets what belongs to one ``fit``, in which modules may be replaced."""
        #: The output layer that what is stored was made for.
        self._made_for: OutputLayer | None = None

    def begin_fit(self, size: int | None, has_changed: bool) -> None:
        """Begins a store anew where the data are others.

        Args:
            size (int, optional): N, if it is known.
            has_changed (bool): Whether they are not those of the last ``fit``.

        Raises:
            ValueError: If N is not known, or a checkpoint's store is of other data.
        """
        if size is None:
            raise ValueError(
                "refresh keeps a row for each sample, but the training data do not say how many there are (no "
                "__len__). Give the data set a length, or leave refresh out."
            )
        self.size = size
        if has_changed and self.store is not None:
            self.selection_pass.warn("the training data are not those of the last fit: what was stored is forgotten.")
            self.store = None
        if self._restored and len(self._restored["stamps"]) != size:
            raise ValueError(
                f"The checkpoint has a store of {len(self._restored['stamps'])} samples, but the training data have "
                f"{size}. Resume on the same data, or load the weights alone (load_weights_only=True)."
            )

    def follow_layer(self, state: State) -> None:
        """Begins anew where the output layer was replaced by another one."""
        if self.layer is not None and self.layer.of(state) != self._made_for:
            self.prepare(state)

    def prepare(self, state: State) -> None:
        """Finds out whether P can be computed from H, and forgets what is stored if it is not what this run keeps.

        Raises:
            ValueError: If margins of suspects cannot be told.
        """
        parts = self.store.state_dict() if self.store is not None else self._restored
        widths: dict[str, int] = {}
        can_compute = False
        if self.layer is not None:
            layer = self._made_for = self.layer.of(state)
            widths["inputs"] = SampleStore.width_within(self.size, layer.in_features, self.limit)
            can_compute = widths["inputs"] == layer.in_features and self.again.is_what_the_loss_takes(state)
            if self.suspects is not None:
                self.suspects.check_layer(can_compute, layer.out_features)
            if not can_compute or "output_grads" in parts:
                widths["output_grads"] = layer.out_features
        unit = parts.get("unit", self.unit)
        fits = unit == self.unit and all(
            name in parts and parts[name].shape[1] == width for name, width in widths.items()
        )
        margins = None
        if "stamps" in parts and not fits:
            if not bool((parts["stamps"] >= 0).any()):
                margins = parts["margins"]  # All that there is, once looks have been forgotten.
            else:
                self.selection_pass.warn(
                    "what was stored of the samples' looks is not what is needed now (refresh in another unit, other "
                    "suspects or store_limit, another rule or output layer): it is forgotten, and all samples are "
                    "looked at again."
                )
            self.store, self._restored = None, {}
        self.computes = can_compute and not (fits and "output_grads" in widths)
        if margins is not None:
            self.of(state).margins = margins

    def of(self, state: State) -> SampleStore:
        """Gives the store, and makes it if there is none."""
        if self.store is None:
            device = None if self.device == "cpu" else state.device.tensor_to_device(torch.zeros(())).device
            keeps_grads = self.layer is not None and not self.computes
            self.store = SampleStore(self.size, self.limit, device, keeps_grads)
            if self._restored:
                self.store.load_state_dict(self._restored)
                self._restored = {}
        return self.store

    def say(self, state: State) -> None:
        """Logs, once, what the store takes, and warns where that is too much for a checkpoint."""
        if self._said:
            return
        self._said = True
        store, per_sample = self.of(state), 16
        if self.layer is not None:
            layer = self.layer.of(state)
            per_sample += 2 * SampleStore.width_within(store.size, layer.in_features, self.limit)
            per_sample += 0 if self.computes else 4 * layer.out_features
        total = per_sample * store.size
        text = (
            f"{self.selection_pass.owner} keeps {per_sample:,} bytes of each of {store.size:,} samples "
            f"({total / 2**20:,.1f} MiB, on the {'host' if store.device.type == 'cpu' else 'device'})"
        )
        if total > CHECKPOINT_LIMIT:
            text += ", more than goes into a checkpoint (256 MiB): after a resumption it looks at all samples again"
            self.selection_pass.warn(text.removeprefix(f"{self.selection_pass.owner} ") + ".")
        log.info("%s.", text)

    def warn_if_wide(self) -> None:
        """Warns, once, that rows of H are kept with fewer digits, since some of their values are very large."""
        if self.store is not None and self.store.is_wide:
            self.selection_pass.warn(
                "the output layer's inputs have values above 65,504, which half precision does not hold: the store "
                "keeps them in bfloat16, to three digits instead of four. A normalisation in front of the layer keeps "
                "them small."
            )

    def compute_no_more(self, state: State) -> None:
        """Begins to keep P, since it is not what follows from the layer's output alone any more."""
        self.selection_pass.warn(
            "the model has begun to make something else of its output layer's output (a clamp, a temperature), which "
            "losses and gradients of stored inputs cannot be computed from: those of each look are kept from now on, "
            "and all samples are looked at again."
            + (" Suspects are told by the layer's own output." if self.suspects is not None else "")
        )
        margins = self.of(state).margins
        self.store, self.computes = None, False
        self.of(state).margins = margins

    def suspected(self) -> torch.Tensor:
        """Lists the numbers of all samples that are suspected now."""
        margins = self._restored.get("margins") if self.store is None else self.store.margins
        if margins is None or self.suspects is None:
            return torch.empty(0, dtype=torch.int64)
        return (margins > self.suspects.margin).nonzero().flatten()

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps: all of the store, or nothing where that is too much."""
        if self.store is None:
            return self._restored
        if self.store.bytes > CHECKPOINT_LIMIT:
            return {}
        return {**self.store.state_dict(), "unit": self.unit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._restored = state
