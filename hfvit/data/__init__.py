"""From a data set to decoded uint8 batches."""
