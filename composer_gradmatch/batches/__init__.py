"""A minibatch as rows: counting its samples, taking some of them, recognising them later on."""

from composer_gradmatch.batches.minibatch import (
    copy_batch,
    copy_structure,
    count_samples,
    describe_targets,
    get_item,
    map_tensors,
    take_samples,
    tensor_leaves,
)
from composer_gradmatch.batches.picked_rows import find_rows, match_rows
from composer_gradmatch.batches.sample_leaves import names_by_length, sample_names

__all__ = [
    "copy_batch",
    "copy_structure",
    "count_samples",
    "describe_targets",
    "find_rows",
    "get_item",
    "map_tensors",
    "match_rows",
    "names_by_length",
    "sample_names",
    "take_samples",
    "tensor_leaves",
]
