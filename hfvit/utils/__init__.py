"""Helpers without knowledge of images, models or runs."""
