"""The steps of an image processor as plain values."""

from dataclasses import dataclass, replace

from PIL.Image import Resampling

from hfvit.errors import ModelError

# Image processors with the steps of their base class, in its order; those of some differ by size.
PLAIN_PROCESSORS = {
    "BeitImageProcessor", "BitImageProcessor", "CLIPImageProcessor", "ConvNextImageProcessor",
    "DINOv3ViTImageProcessor", "DeiTImageProcessor", "LevitImageProcessor", "PoolFormerImageProcessor",
    "PvtImageProcessor", "SiglipImageProcessor", "ViTImageProcessor",
}  # fmt: skip
LEVIT_RATIO = 256 / 224  # of the resized shorter side to `size`
CONVNEXT_WARPS_FROM = 384  # pixels; ConvNextImageProcessor does not crop from this size on


@dataclass(frozen=True)
class ImageSteps:
    """Hold the steps of an image processor in order; None omits a step.

    Args:
        resize: (height, width) in pixels, or the length of the shorter side.
        resample: interpolation of `resize`.
        crop: (height, width) in pixels of the center crop.
        rounds_crop_down: round the start of a crop down (transformers) or to the even pixel (torchvision, timm).
        scale: factor of the uint8 values, such as 1/255.
        mean: mean of each channel.
        std: standard deviation of each channel.
    """

    resize: int | tuple[int, int] | None
    resample: Resampling
    crop: tuple[int, int] | None
    rounds_crop_down: bool
    scale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def image_steps(processor) -> ImageSteps:
    """Read the steps of an image processor of timm or transformers.

    Raises:
        ModelError: the processor has other steps.
    """
    name = processor_name(processor)
    if name == "TimmWrapperImageProcessor":
        steps = _timm_steps(processor)
    elif name in PLAIN_PROCESSORS:
        steps = _stock_steps(processor, name)
    else:
        raise ModelError(
            f"The image processor must be that of a timm checkpoint or one of {', '.join(sorted(PLAIN_PROCESSORS))},"
            f" got {name}."
        )
    resized = (steps.resize, steps.resize) if isinstance(steps.resize, int) else steps.resize
    if steps.crop and resized and any(crop > side for crop, side in zip(steps.crop, resized, strict=True)):
        raise ModelError(
            f"The image processor must not crop more than {resized} pixels, got {steps.crop}. Padding is unsupported."
        )
    return replace(steps, crop=None) if steps.crop == steps.resize else steps


def processor_name(processor) -> str:
    """Return the class of an image processor without the suffix of its backend."""
    return type(processor).__name__.removesuffix("Fast").removesuffix("Pil")


def crops_alike(steps: ImageSteps) -> bool:
    """Return whether timm and transformers crop images of any size alike."""
    if steps.crop is None:
        return True
    if not isinstance(steps.resize, tuple):
        return False  # the margin of the longer side may be odd
    return not any((side - crop) % 2 for side, crop in zip(steps.resize, steps.crop, strict=True))


def _timm_steps(processor) -> ImageSteps:
    found = {}
    for transform in processor.val_transforms.transforms:
        name = type(transform).__name__
        if name not in ("Resize", "CenterCrop", "ToTensor", "MaybeToTensor", "Normalize") or name in found:
            raise ModelError(
                f"The checkpoint's preprocessing has the unsupported step {name}. Set a square input_size and"
                " crop_mode 'center' or 'squash' in its pretrained_cfg."
            )
        found[name] = transform
    resize = found["Resize"]
    crop = found["CenterCrop"]
    size = resize.size if isinstance(resize.size, int) else tuple(resize.size)
    return ImageSteps(
        resize=size[0] if isinstance(size, tuple) and len(size) == 1 else size,
        resample=Resampling[resize.interpolation.name],
        crop=(crop.size, crop.size) if isinstance(crop.size, int) else tuple(crop.size),
        rounds_crop_down=False,
        scale=1 / 255,
        mean=tuple(processor.data_config["mean"]),
        std=tuple(processor.data_config["std"]),
    )


def _stock_steps(processor, name: str) -> ImageSteps:
    if getattr(processor, "do_pad", False):
        raise ModelError(f"{name} pads images, which is not supported. Set do_pad to false in its configuration.")
    size = processor.size
    crop = getattr(processor, "crop_size", None)
    resize = size["shortest_edge"] if size.get("shortest_edge") else (size.get("height"), size.get("width"))
    crop = (crop["height"], crop["width"]) if crop and getattr(processor, "do_center_crop", False) else None
    if name == "ConvNextImageProcessor":
        if resize < CONVNEXT_WARPS_FROM:
            resize, crop = int(resize / processor.crop_pct), (resize, resize)
        else:
            resize = (resize, resize)
    elif name == "LevitImageProcessor" and isinstance(resize, int):
        resize = int(LEVIT_RATIO * resize)
    elif name == "PoolFormerImageProcessor" and processor.crop_pct is not None:
        resize = int((resize if isinstance(resize, int) else resize[0]) / processor.crop_pct)
    if processor.do_resize and (not resize or None in (resize if isinstance(resize, tuple) else (resize,))):
        raise ModelError(f"{name}: size must have shortest_edge, or height and width, got {dict(size)}.")
    return ImageSteps(
        resize=resize if processor.do_resize else None,
        resample=Resampling(int(processor.resample)),
        crop=crop,
        rounds_crop_down=True,
        scale=processor.rescale_factor if processor.do_rescale else None,
        mean=tuple(processor.image_mean) if processor.do_normalize else None,
        std=tuple(processor.image_std) if processor.do_normalize else None,
    )
