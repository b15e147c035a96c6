"""Batched image operations with one magnitude per image."""

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

# ITU-R 601-2 luma, as in Pillow and torchvision.
LUMA = (0.2989, 0.587, 0.114)
MAX_BLUR = 2.0  # largest standard deviation of a blur in pixels


def gray(images: torch.Tensor) -> torch.Tensor:
    """Compute the luma (batch, 1, height, width)."""
    red, green, blue = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def identity(images, magnitude):
    """Return the images unchanged."""
    return images


def grayscale(images, magnitude):
    """Convert to grayscale with three channels."""
    return gray(images).expand_as(images)


# Blends of an image with a degenerate one: magnitude 0 is the degenerate image, 1 the image, above 1 extrapolates.


def brightness(images, magnitude):
    """Blend with black."""
    return _blend(images, torch.zeros_like(images), magnitude)


def contrast(images, magnitude):
    """Blend with the mean gray of the image."""
    return _blend(images, gray(images).mean(dim=(2, 3), keepdim=True), magnitude)


def saturation(images, magnitude):
    """Blend with the grayscale image."""
    return _blend(images, gray(images), magnitude)


def sharpness(images, magnitude):
    """Blend with the image smoothed by a 3x3 kernel, except for the border pixels."""
    kernel = images.new_full((3, 3), 1 / 13)
    kernel[1, 1].fill_(5 / 13)  # an assignment would synchronize with the device
    smooth = images.clone()
    inner = F.conv2d(images, kernel.expand(images.shape[1], 1, 3, 3), groups=images.shape[1])
    smooth[..., 1:-1, 1:-1] = inner.round()
    return _blend(images, smooth, magnitude)


def _blend(images, degenerate, magnitude):
    return torch.lerp(degenerate, images, magnitude[:, None, None, None]).clamp_(0.0, 255.0)


# Operations on levels (0 to 255).


def invert(images, magnitude):
    """Invert all levels."""
    return 255.0 - images


def posterize(images, magnitude):
    """Keep `magnitude` bits of 8."""
    step = torch.exp2(8.0 - magnitude)[:, None, None, None]
    return (images / step).floor() * step


def solarize(images, magnitude):
    """Invert levels of at least `magnitude`."""
    return torch.where(images >= magnitude[:, None, None, None], 255.0 - images, images)


def solarize_add(images, magnitude):
    """Add `magnitude` to levels below 128."""
    return torch.where(images < 128.0, (images + magnitude[:, None, None, None]).clamp(max=255.0), images)


def autocontrast(images, magnitude):
    """Stretch each channel to the full range."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) * (255.0 / (high - low)), images)


def equalize(images, magnitude):
    """Flatten each channel's histogram."""
    return tv.equalize(images.round().to(torch.uint8)).to(images.dtype)


def gaussian_blur(images, magnitude):
    """Blur with a Gaussian of standard deviation `magnitude` in pixels."""
    reach = min(int(3 * MAX_BLUR), images.shape[-1] - 1, images.shape[-2] - 1)
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / magnitude[:, None].clamp(min=1e-3)) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    batch, channels, height, _ = images.shape
    padded = F.pad(images, (reach,) * 4, mode="reflect").reshape(1, batch * channels, height + 2 * reach, -1)
    kernel = kernel.repeat_interleave(channels, dim=0)[:, None]
    padded = F.conv2d(padded, kernel[:, :, None, :], groups=batch * channels)
    return F.conv2d(padded, kernel[:, :, :, None], groups=batch * channels).view_as(images)


# Geometric operations with bilinear sampling and black fill (`Augmentation` shifts it to the mean color).


def shear_x(images, magnitude):
    """Shift each row by `magnitude` times its distance from the top."""
    zero, one = torch.zeros_like(magnitude), torch.ones_like(magnitude)
    return _affine(images, (one, magnitude, magnitude * images.shape[-2] / 2), (zero, one, zero))


def shear_y(images, magnitude):
    """Shift each column by `magnitude` times its distance from the left."""
    zero, one = torch.zeros_like(magnitude), torch.ones_like(magnitude)
    return _affine(images, (one, zero, zero), (magnitude, one, magnitude * images.shape[-1] / 2))


def translate_x(images, magnitude):
    """Move to the right by a fraction `magnitude` of the width."""
    zero, one = torch.zeros_like(magnitude), torch.ones_like(magnitude)
    return _affine(images, (one, zero, -magnitude * images.shape[-1]), (zero, one, zero))


def translate_y(images, magnitude):
    """Move down by a fraction `magnitude` of the height."""
    zero, one = torch.zeros_like(magnitude), torch.ones_like(magnitude)
    return _affine(images, (one, zero, zero), (zero, one, -magnitude * images.shape[-2]))


def rotate(images, magnitude):
    """Rotate by `magnitude` degrees counterclockwise about the center."""
    angle = torch.deg2rad(magnitude)
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    return _affine(images, (cos, -sin, zero), (sin, cos, zero))


def _affine(images, x_row, y_row):
    """Sample at the rows applied to (x, y, 1), in pixels from the center."""
    height, width = images.shape[-2:]
    (a, b, c), (d, e, f) = x_row, y_row
    theta = torch.stack(
        [
            torch.stack([a, b * (height / width), c * (2.0 / width)], dim=1),
            torch.stack([d * (width / height), e, f * (2.0 / height)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


OPS = {
    op.__name__: op
    for op in (
        *(identity, grayscale, brightness, contrast, saturation, sharpness, invert, posterize, solarize, solarize_add),
        *(autocontrast, equalize, gaussian_blur, shear_x, shear_y, translate_x, translate_y, rotate),
    )
}
GEOMETRIC = frozenset({"shear_x", "shear_y", "translate_x", "translate_y", "rotate"})
