"""Mask tokens and passwords in JSON values."""

from typing import Any

from hfvit.errors import mask_credentials


def mask_values(value: Any) -> Any:
    """Apply `mask_credentials` to all strings of a JSON value, except keys."""
    if isinstance(value, dict):
        return {key: mask_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [mask_values(item) for item in value]
    return mask_credentials(value) if isinstance(value, str) else value
