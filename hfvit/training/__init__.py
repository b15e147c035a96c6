"""Training loop: the Trainer and its callbacks."""
