"""A linear output layer: finding it, seeing its inputs H and output gradients P, and their Gram matrix K."""

from composer_gradmatch.last_layer.checked_tap import CheckedTap
from composer_gradmatch.last_layer.find import check_named, name_of, resolve_output_layer
from composer_gradmatch.last_layer.gram import last_layer_gram
from composer_gradmatch.last_layer.layers import LinearLayer, OutputLayer, Watch
from composer_gradmatch.last_layer.observe import observe_output_layer
from composer_gradmatch.last_layer.tap import OutputLayerTap, sample_dim

__all__ = [
    "CheckedTap",
    "LinearLayer",
    "OutputLayer",
    "OutputLayerTap",
    "Watch",
    "check_named",
    "last_layer_gram",
    "name_of",
    "observe_output_layer",
    "resolve_output_layer",
    "sample_dim",
]
