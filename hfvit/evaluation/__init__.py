"""Labelled evaluation of finished models."""
