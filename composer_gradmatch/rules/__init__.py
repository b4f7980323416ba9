"""What to pick of a minibatch: a file a rule, from what is known of its samples to weighted picks."""
