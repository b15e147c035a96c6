"""The steps of an image processor as plain values."""

from dataclasses import dataclass, replace

from PIL.Image import Resampling

from hfvit.errors import ModelError

# Stock processors whose steps are the base class's, in its order; ConvNext's are told apart below.
PLAIN_PROCESSORS = {
    "BeitImageProcessor", "BitImageProcessor", "CLIPImageProcessor", "ConvNextImageProcessor", "DeiTImageProcessor",
    "PvtImageProcessor", "SiglipImageProcessor", "ViTImageProcessor",
}  # fmt: skip
CONVNEXT_WARPS_FROM = 384  # pixels; ConvNextImageProcessor crops below this size and only resizes from it on


@dataclass(frozen=True)
class ImageSteps:
    """The steps in order; a step that is None is left out. Sizes are (height, width) in pixels.

    An integer `resize` is the length of the shorter side, the longer one follows. `rounds_crop_down` tells where a
    crop begins when it cannot be centred: transformers rounds down, torchvision (and so timm) to the even pixel.
    """

    resize: int | tuple[int, int] | None
    resample: Resampling
    crop: tuple[int, int] | None
    rounds_crop_down: bool
    scale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def image_steps(processor) -> ImageSteps:
    """The steps of timm's or a stock image processor; `ModelError` for one that does anything else."""
    name = type(processor).__name__.removesuffix("Fast").removesuffix("Pil")
    if name == "TimmWrapperImageProcessor":
        steps = _timm_steps(processor)
    elif name in PLAIN_PROCESSORS:
        steps = _stock_steps(processor, name)
    else:
        raise ModelError(
            f"The image processor {name} is none whose steps are known ({', '.join(sorted(PLAIN_PROCESSORS))}, or"
            " that of a timm checkpoint)."
        )
    shorter = steps.resize if isinstance(steps.resize, int) else min(steps.resize or (0,))
    if steps.crop and steps.resize and max(steps.crop) > shorter:
        raise ModelError(f"The image processor crops {steps.crop} pixels out of {shorter}; padding is not supported.")
    return replace(steps, crop=None) if steps.crop == steps.resize else steps


def _timm_steps(processor) -> ImageSteps:
    found = {}
    for transform in processor.val_transforms.transforms:
        name = type(transform).__name__
        if name not in ("Resize", "CenterCrop", "ToTensor", "MaybeToTensor", "Normalize") or name in found:
            raise ModelError(
                f"The checkpoint's preprocessing has the step {name}, which no stock image processor does; give its"
                " pretrained_cfg a square input_size and crop_mode 'center' or 'squash'."
            )
        found[name] = transform
    resize, crop = found["Resize"], found["CenterCrop"]
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
        raise ModelError(f"{name} pads pictures, which is not supported; set do_pad to false in its configuration.")
    size, crop = processor.size, getattr(processor, "crop_size", None)
    resize = size["shortest_edge"] if size.get("shortest_edge") else (size.get("height"), size.get("width"))
    crop = (crop["height"], crop["width"]) if crop and getattr(processor, "do_center_crop", False) else None
    if name == "ConvNextImageProcessor":
        if resize < CONVNEXT_WARPS_FROM:
            resize, crop = int(resize / processor.crop_pct), (resize, resize)
        else:
            resize = (resize, resize)
    if processor.do_resize and (not resize or None in (resize if isinstance(resize, tuple) else (resize,))):
        raise ModelError(f"{name} resizes to {dict(size)}; only shortest_edge or height and width are supported.")
    return ImageSteps(
        resize=resize if processor.do_resize else None,
        resample=Resampling(int(processor.resample)),
        crop=crop,
        rounds_crop_down=True,
        scale=processor.rescale_factor if processor.do_rescale else None,
        mean=tuple(processor.image_mean) if processor.do_normalize else None,
        std=tuple(processor.image_std) if processor.do_normalize else None,
    )
