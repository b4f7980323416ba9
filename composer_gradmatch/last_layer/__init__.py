"""A linear output layer: finding it, seeing its inputs H and output gradients P, and their Gram matrix K."""

from composer_gradmatch.last_layer.checked_tap import CheckedTap
from composer_gradmatch.last_layer.find import (
    as_returned,
    cannot_find,
    find_output_layer,
    name_of,
    resolve_output_layer,
    watch_linears,
)
from composer_gradmatch.last_layer.gram import last_layer_gram
from composer_gradmatch.last_layer.observe import observe_output_layer
from composer_gradmatch.last_layer.tap import OutputLayerTap, first_input, sample_dim

__all__ = [
    "CheckedTap",
    "OutputLayerTap",
    "as_returned",
    "cannot_find",
    "find_output_layer",
    "first_input",
    "last_layer_gram",
    "name_of",
    "observe_output_layer",
    "resolve_output_layer",
    "sample_dim",
    "watch_linears",
]
