"""Demos of a classifier."""
