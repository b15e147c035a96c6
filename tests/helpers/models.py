"""Image models, by the keys of a recipe."""

from hfvit.models.factory import build_image_model
from hfvit.recipe.arguments import ModelArguments


def build_model(labels, timm_kwargs=None, **arguments):
    """Build the model of `ModelArguments(**arguments, model_args=timm_kwargs)`."""
    return build_image_model(ModelArguments(model_args=timm_kwargs, **arguments), labels)
