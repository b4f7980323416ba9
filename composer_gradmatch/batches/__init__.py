"""A minibatch as rows: counting its samples, taking some of them, recognising them later on."""

from composer_gradmatch.batches.minibatch import (
    copy_batch,
    copy_structure,
    count_samples,
    describe_targets,
    find_rows,
    get_item,
    map_tensors,
    match_rows,
    names_by_length,
    sample_names,
    take_samples,
    tensor_leaves,
)

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
