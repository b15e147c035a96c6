"""Load data sets and read them as uint8 batches."""
