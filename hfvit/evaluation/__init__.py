"""Evaluation of finished models on labeled data."""
