"""Alias of `hfvit.models.image_text`, for model cards written by version 0.1."""

from hfvit.models.image_text import HFViTFusionConfig, HFViTFusionForImageClassification

__all__ = ["HFViTFusionConfig", "HFViTFusionForImageClassification"]
