"""One forward pass instead of two: the selection pass's activations, sliced, serve the backward pass of the picks."""
