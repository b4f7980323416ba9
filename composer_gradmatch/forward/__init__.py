"""The forward pass over a minibatch that leaves no trace, and its samples' losses."""
