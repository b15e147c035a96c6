"""Former place of `hfvit.models.image_text`, which model cards written by version 0.1 tell their readers to import."""

from hfvit.models.image_text import HFViTFusionConfig, HFViTFusionForImageClassification

__all__ = ["HFViTFusionConfig", "HFViTFusionForImageClassification"]
