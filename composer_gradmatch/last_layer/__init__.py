"""A linear output layer: finding it, seeing its inputs H and output gradients P, and their Gram matrix K."""

from composer_gradmatch.last_layer.tap import (
    OutputLayerTap,
    as_returned,
    cannot_find,
    find_output_layer,
    first_input,
    last_layer_gram,
    resolve_output_layer,
    sample_dim,
    watch_linears,
)

__all__ = [
    "OutputLayerTap",
    "as_returned",
    "cannot_find",
    "find_output_layer",
    "first_input",
    "last_layer_gram",
    "resolve_output_layer",
    "sample_dim",
    "watch_linears",
]
