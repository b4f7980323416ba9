"""Recognising samples: which rows of a batch that was recorded another batch holds, after others have changed it.

When to call what::

    names = sample_names(batch, num_samples, whole)          # of the whole minibatch, once, before picking
    picked = take_samples(batch, indices, num_samples, whole)
    record = RowRecord.of(picked, len(indices), names, original=batch, indices=indices)
    state.batch = picked
    ...                                                      # on BATCH_START, after other algorithms
    weights = record.weights_now(state.batch, weights)       # or rows = record.rows_now(state.batch)
    now = record.updated(state.batch)
    ...                                                      # on BEFORE_FORWARD
    microbatch_weights = now.weights_of(state.batch, weights)

A leaf that is the same unchanged tensor, a view of its memory, or a list of the same objects says for nothing which
rows it holds. Only where that is not so are contents compared: NaN equals NaN, and -0.0 equals 0.0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from composer_gradmatch.batches.nests import is_array, is_sequence, named_leaves, resized
from composer_gradmatch.batches.row_codes import (
    VALUES,
    as_tensor,
    codes_of_objects,
    codes_of_tensors,
    is_all_of,
    is_equal,
    rows_in_memory,
)
from composer_gradmatch.batches.sample_leaves import length, sample_names

__all__ = ["ContradictionError", "RowRecord", "find_rows", "match_rows"]


class ContradictionError(ValueError):
    """Rows of one leaf of a batch were reordered, and those of another were not: inputs and targets are mixed up."""


@dataclass(frozen=True, eq=False)
class RowRecord:
    """What the rows of a batch were at one moment; it keeps references only.

    Attributes:
        leaves (Mapping[str, Any]): The batch's sample leaves by name.
        num_rows (int): n.
        versions (Mapping[str, int]): The version counters of its tensors.
        original (Mapping[str, Any], optional): The same leaves of the batch that rows were picked from.
            Default: ``{}``.
        indices (torch.Tensor, optional): The picks. Default: ``None``.
    """

    leaves: Mapping[str, Any]
    num_rows: int
    versions: Mapping[str, int]
    original: Mapping[str, Any] = field(default_factory=dict)
    original_versions: Mapping[str, int] = field(default_factory=dict)
    indices: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        batch: Any,
        num_rows: int,
        names: Collection[str] | None = None,
        *,
        original: Any = None,
        indices: torch.Tensor | None = None,
    ) -> RowRecord:
        """Records a batch.

        Args:
            batch (Any): A batch of n rows.
            num_rows (int): n.
            names (Collection[str], optional): The names of its sample leaves; None for all of length n.
                Default: ``None``.
            original (Any, optional): The batch that its rows were picked from: what a tensor that is changed in
                place is compared with. Default: ``None``.
            indices (torch.Tensor, optional): Which rows of the original they are. Default: ``None``.
        """
        leaves = {
            name: resized(leaf, list(leaf)) if is_sequence(leaf) else leaf
            for name, leaf in _leaves(batch, names, num_rows).items()
            if length(leaf) == num_rows
        }
        wholes = {} if original is None else _leaves(original, leaves)
        return cls(leaves, num_rows, _versions(leaves), wholes, _versions(wholes), indices)

    def is_still(self, batch: Any) -> bool:
        """Tells whether a batch has the very tensors that were recorded, or views of all of them, unchanged.

        Then its rows are known, without a look at anything else.
        """
        leaves = _leaves(batch, self.leaves)
        return 0 < len(leaves) == len(self.versions) == len(self.leaves) and all(
            isinstance(leaf, torch.Tensor) and self._is_all_of(name, leaf) for name, leaf in leaves.items()
        )

    def _is_all_of(self, name: str, leaf: torch.Tensor) -> bool:
        whole = self.leaves[name]
        if leaf._version != self.versions[name]:
            return False
        return leaf is whole or is_all_of(leaf, whole)

    def updated(self, batch: Any) -> RowRecord:
        """Records the batch as it now is, of any number of rows, with the names of this record."""
        leaves = {name: leaf for name, leaf in _leaves(batch, self.leaves).items() if length(leaf) is not None}
        lengths = [length(leaf) for leaf in leaves.values()]
        # Of inputs that are there twice (views for contrasts), and targets that are there once, the most common.
        num_rows = max(lengths, key=lengths.count) if lengths else 0
        return RowRecord.of(batch, int(num_rows or 0), leaves)

    def names_left_whole(self, microbatch: Any) -> set[str]:
        """Gives the names of tensors that are whole in a microbatch in which others are split: they are not per sample.

        Args:
            microbatch (Any): A part of the recorded batch, as its ``DataSpec`` has split it.
        """
        leaves = _leaves(microbatch, self.leaves)
        whole = {name for name, leaf in leaves.items() if is_array(leaf) and leaf is self.leaves[name]}
        split = any((n := length(leaf)) is not None and n < self.num_rows for leaf in leaves.values())
        return whole if split else set()

    def rows_now(self, batch: Any) -> torch.Tensor:
        """Tells which recorded row each row of the batch is, after other algorithms may have changed it.

        Leaves that were changed are no evidence. Of rows that are alike in all that is left, the first.

        Args:
            batch (Any): The batch as it now is.

        Returns:
            torch.Tensor: Rows, int64, on the CPU: of another number than before where the batch has another number.

        Raises:
            ContradictionError: If one leaf was reordered and another was not.
            ValueError: If nothing tells.
        """
        found = _match(self, batch, fresh=False)
        if found is None or (found.same is not None and not found.complete and bool((found.same.sum(1) > 1).any())):
            raise ValueError(_UNKNOWN_NOW)
        return torch.tensor(found.rows, dtype=torch.int64)

    def weights_now(self, batch: Any, weights: torch.Tensor) -> torch.Tensor:
        """Gives the weights of the batch's rows, after other algorithms may have changed it.

        Rows that are alike in everything get the mean of their weights.

        Args:
            batch (Any): The batch as it now is.
            weights (torch.Tensor): The recorded rows' weights, shape (n,).

        Raises:
            ContradictionError: If one leaf was reordered and another was not.
            ValueError: If nothing tells.
        """
        return _weigh(self, _match(self, batch, fresh=False), weights, _UNKNOWN_NOW)

    def rows_unchanged(self, microbatch: Any) -> torch.Tensor | None:
        """Tells which recorded row each row of a microbatch is, if all that is recorded of them is as it was.

        Args:
            microbatch (Any): A part of the recorded batch, as its ``DataSpec`` has split it.

        Returns:
            torch.Tensor | None: Rows, int64, on the CPU; None if anything was changed (inputs that were mixed or
            resized, say), or it cannot be told which rows they are.
        """
        try:
            places = _weigh(self, _match(self, microbatch, fresh=True), torch.arange(float(self.num_rows)), _UNKNOWN)
        except ValueError:
            return None
        rows, leaves = places.round().long(), _leaves(microbatch, self.leaves)
        if not torch.equal(places, rows.to(places.dtype)) or leaves.keys() != self.leaves.keys():
            return None  # Rows that are alike have the mean of their places.
        for name, leaf in leaves.items():
            whole = self.leaves[name]
            if not isinstance(leaf, torch.Tensor) or not isinstance(whole, torch.Tensor):
                continue
            if whole._version != self.versions[name] or not torch.equal(leaf, whole[rows.to(whole.device)]):
                return None
        return rows.cpu()

    def weights_of(self, microbatch: Any, weights: torch.Tensor) -> torch.Tensor:
        """Gives the weights of a microbatch's samples, in its own order: see :func:`match_rows`.

        A view is trusted to show its rows, though a forward pass may have changed them in place.
        """
        return _weigh(self, _match(self, microbatch, fresh=True), weights, _UNKNOWN)


def match_rows(
    microbatch: Any, batch: Any, weights: torch.Tensor, names: Collection[str] | None = None
) -> torch.Tensor:
    """Gives the weights of a microbatch's samples, in its own order, found by recognising the samples.

    A ``DataSpec`` may split a batch as it likes. Views of the batch's tensors (Composer's default) are
    recognised by their place in memory. Copies are recognised by content; samples that are alike in everything
    get the mean of their weights, which leaves the weighted sum over them as it was.

    Args:
        microbatch (Any): Some samples of ``batch``, in the same structure.
        batch (Any): The batch of the n picked samples.
        weights (torch.Tensor): Their weights, shape (n,).
        names (Collection[str], optional): The names of its sample leaves; None for all of length n.
            Default: ``None``.

    Returns:
        torch.Tensor: The weights of the microbatch's samples, on the device of ``weights``.

    Raises:
        ValueError: If samples cannot be recognised beyond doubt.
    """
    return RowRecord.of(batch, len(weights), names).weights_of(microbatch, weights)


def find_rows(microbatch: Any, batch: Any, num_samples: int, read: Sequence[bool]) -> torch.Tensor | None:
    """Tells which samples of a batch a microbatch holds, by the tensors that matter.

    Args:
        microbatch (Any): Some samples of ``batch``, in the same structure.
        batch (Any): The batch of n samples.
        num_samples (int): n.
        read (Sequence[bool]): Which of the batch's tensors matter.

    Returns:
        torch.Tensor | None: Rows, int64, shape (m,), on the CPU; of samples alike in all that matters the first.
        None if something that matters is in no row of the batch.
    """
    parts, wholes = _tensors(microbatch), _tensors(batch)
    if len(parts) != len(wholes) or len(wholes) != len(read):
        return None
    same: torch.Tensor | None = None
    found: list[int] | None = None
    for part, whole, matters in zip(parts, wholes, read, strict=True):
        if not matters:
            continue
        if not whole.dim() or len(whole) != num_samples:
            if part is not whole and not is_equal(part, whole):
                return None
            continue
        rows = rows_in_memory(part, whole) if part.shape[1:] == whole.shape[1:] else None
        if rows is not None and (found is None or rows == found):
            found = rows
            continue
        codes = codes_of_tensors(part, whole) if part.shape[1:] == whole.shape[1:] else None
        if codes is None or (same is not None and len(part) != len(same)):
            return None
        equal = codes[0][:, None] == codes[1]
        same = equal if same is None else same & equal
    if same is None:
        return None if found is None else torch.tensor(found, dtype=torch.int64)
    if found is not None:
        fits = len(found) == len(same) and bool(same[torch.arange(len(found)), torch.tensor(found)].all())
        return torch.tensor(found, dtype=torch.int64) if fits else None
    return same.int().argmax(1) if bool(same.any(1).all()) else None


@dataclass(frozen=True)
class _Match:
    """Rows that were found.

    Attributes:
        rows (list[int]): A recorded row for each.
        same (torch.Tensor, optional): All that each could be, boolean, shape (m, n); None where there is no other.
        complete (bool): Whether they are alike in everything.
    """

    rows: list[int]
    same: torch.Tensor | None = None
    complete: bool = True


def _match(record: RowRecord, part: Any, *, fresh: bool) -> _Match | None:
    """Recognises rows; ``fresh`` trusts memory, whatever the versions, and looks no further."""
    leaves = _leaves(part, record.leaves)
    certain: list[int] | None = None
    others = []
    for name in record.leaves:
        if name not in leaves:
            continue
        rows = _rows_by_identity(record, name, leaves[name], fresh)
        if rows is None:
            others.append(name)
        elif certain is None:
            certain = rows
        elif rows != certain:
            raise ContradictionError(_CONTRADICTION.format(name=name))
    if certain is not None:
        if not fresh:
            for name in others:
                _check_agrees(record, name, leaves[name], certain)
        return _Match(certain)
    return _match_contents(record, leaves)


def _match_contents(record: RowRecord, leaves: Mapping[str, Any]) -> _Match | None:
    found, complete = [], True
    for name in record.leaves:
        codes = _codes_of(record, name, leaves[name]) if name in leaves else None
        equal = None if codes is None else codes[0][:, None] == codes[1]
        if codes is None or equal is None or not bool(equal.any(1).all()):
            complete = False  # It has been changed, or is gone.
        else:
            found.append((len(codes[1].unique()), _tells(record.leaves[name]), name, equal))
    # What tells rows apart best goes first.
    found.sort(key=lambda entry: (-entry[0], not entry[1]))
    same = None
    certain = False
    for distinct, tells, name, equal in found:
        if same is None:
            same, certain = equal, tells and distinct == record.num_rows
            continue
        both = same & equal if same.shape == equal.shape else torch.zeros_like(same)
        if bool(both.any(1).all()):
            same = both
        elif certain and tells and distinct == record.num_rows:
            raise ContradictionError(_CONTRADICTION.format(name=name))
        elif bool((same.sum(1) == 1).all()):
            complete = False  # Repeated values (labels) that were changed to one another.
        else:
            return None
    return None if same is None else _Match(same.int().argmax(1).tolist(), same, complete)


def _weigh(record: RowRecord, found: _Match | None, weights: torch.Tensor, unknown: str) -> torch.Tensor:
    """Gives the weights of rows that were found."""
    if found is None or len(weights) != record.num_rows:
        raise ValueError(unknown)
    if found.same is None:
        if found.rows == list(range(len(weights))):
            return weights
        first, step = found.rows[0], found.rows[1] - found.rows[0] if len(found.rows) > 1 else 1
        if step == 1 and found.rows == list(range(first, first + len(found.rows))):
            return weights[first : first + len(found.rows)]
        return weights[torch.tensor(found.rows, device=weights.device)]
    matches = found.same.to(weights.device, weights.dtype)
    means = matches @ weights / matches.sum(1)
    spread = torch.where(matches > 0, (weights - means[:, None]).abs(), 0.0).amax(1)
    if not found.complete and not bool((spread <= 1e-6 * means.abs()).all()):
        raise ValueError(unknown)
    return means


def _rows_by_identity(record: RowRecord, name: str, part: Any, fresh: bool) -> list[int] | None:
    """Rows of a leaf without a look at contents, or None."""
    whole = record.leaves[name]
    if is_sequence(whole):
        return _rows_of_objects(part, whole) if is_sequence(part) else None
    if isinstance(whole, np.ndarray):
        if not fresh or not isinstance(part, np.ndarray):
            return None  # Arrays have no version that tells of changes.
        part, whole = as_tensor(part), as_tensor(whole)
    if not isinstance(part, torch.Tensor) or not isinstance(whole, torch.Tensor):
        return None
    if not fresh and whole._version != record.versions[name]:
        return None
    return list(range(record.num_rows)) if part is whole else rows_in_memory(part, whole)


def _rows_of_objects(part: Any, whole: Any) -> list[int] | None:
    """Rows of a list of samples' values that are objects, each in it once."""
    at = {id(item): i for i, item in enumerate(whole)}
    if len(at) != len(whole) or any(isinstance(item, VALUES) for item in whole):
        return None
    rows = [at.get(id(item), -1) for item in part]
    return None if -1 in rows or not rows else rows


def _check_agrees(record: RowRecord, name: str, part: Any, rows: list[int]) -> None:
    """Raises if a leaf that tells rows apart by content tells of other rows."""
    if not _tells(record.leaves[name]) or length(part) != len(rows):
        return
    codes = _codes_of(record, name, part)
    if codes is None:
        return
    now, recorded = (code.tolist() for code in codes)
    known = set(recorded)
    if len(known) == len(recorded) and known.issuperset(now) and now != [recorded[row] for row in rows]:
        raise ContradictionError(_CONTRADICTION.format(name=name))


def _tells(leaf: Any) -> bool:
    """Whether equal rows of a leaf are the same sample's: a single number (a label) may be changed to another's."""
    if is_array(leaf):
        return leaf.ndim > 1 and leaf[0].size != 1 if isinstance(leaf, np.ndarray) else leaf[:1].numel() > 1
    return not any(isinstance(item, VALUES) for item in leaf)


def _codes_of(record: RowRecord, name: str, part: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes on the CPU that are equal where rows of a leaf are, of the part and of the recorded leaf as it was."""
    whole = record.leaves[name]
    changed = isinstance(whole, np.ndarray) or (
        isinstance(whole, torch.Tensor) and whole._version != record.versions[name]
    )
    if changed and record.indices is not None and is_array(record.original.get(name)):
        original = record.original[name]
        if isinstance(original, torch.Tensor) and original._version != record.original_versions[name]:
            return None
        at = record.indices
        whole = original[at.cpu().numpy()] if isinstance(original, np.ndarray) else original[at.to(original.device)]
    elif changed and isinstance(whole, torch.Tensor):
        return None
    if is_sequence(whole) or (isinstance(whole, np.ndarray) and whole.dtype.kind not in "biufc"):
        return codes_of_objects(list(part), list(whole)) if is_sequence(part) or is_array(part) else None
    part, whole = as_tensor(part), as_tensor(whole)
    if not isinstance(part, torch.Tensor) or not isinstance(whole, torch.Tensor):
        return None
    return codes_of_tensors(part, whole)


def _leaves(batch: Any, names: Collection[str] | None, num_rows: int = 0) -> dict[str, Any]:
    """Gives the leaves of those names; without names, all sample leaves of so many rows."""
    if names is None:
        names = sample_names(batch, num_rows)
    return {name: leaf for name, leaf in named_leaves(batch, names) if name in names}


def _versions(leaves: Mapping[str, Any]) -> dict[str, int]:
    return {name: leaf._version for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in named_leaves(batch) if isinstance(leaf, torch.Tensor)]


_UNKNOWN = (
    "Cannot tell which of the picked samples a microbatch holds, so their weights cannot reach the loss: the "
    "DataSpec's split_batch copies samples and its microbatch_transforms (or another algorithm) change them. "
    "Let split_batch return slices of the batch's tensors, or move the transform to batch_transforms."
)
_UNKNOWN_NOW = (
    "Cannot tell which of the picked samples the minibatch now holds, so their weights cannot reach the loss: another "
    "algorithm has reordered or replaced them on AFTER_DATALOADER, and changed all that tells them apart. List that "
    "algorithm so that it runs before the selection, or let it keep the inputs or the targets as they are."
)
_CONTRADICTION = (
    "Another algorithm has reordered the picked samples in one part of the minibatch and not in another ({name!r} is "
    "among those that differ), so that inputs and targets no longer belong together. Let it reorder all parts alike, "
    "or none."
)
