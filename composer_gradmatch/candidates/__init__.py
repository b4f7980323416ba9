"""Where a rule's candidates come from: a selection pass, the training step's own forward pass, or nowhere."""
