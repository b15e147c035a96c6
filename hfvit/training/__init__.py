"""The Trainer and what belongs to the training loop."""
