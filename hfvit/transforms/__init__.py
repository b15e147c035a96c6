"""Batched image transforms on the device."""
