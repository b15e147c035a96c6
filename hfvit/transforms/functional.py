"""Batched image operations with parameters of each image.

Operations of a family run together.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

# ITU-R 601-2 luma, as in Pillow and torchvision.
LUMA = (0.2989, 0.587, 0.114)
MAX_BLUR = 2.0  # largest standard deviation of a blur in pixels
NUM_PARAMETERS = 6  # of an image and operation; families use the first ones

# `Augmentation` fills the pixels that an affine transform uncovers with the mean color, and holds the constants below
# on its device.
SMOOTHING = ((1 / 13, 1 / 13, 1 / 13), (1 / 13, 5 / 13, 1 / 13), (1 / 13, 1 / 13, 1 / 13))


class Constants:
    """Constants of the operations on a device.

    Args:
        fill: color of uncovered pixels, (3, 1, 1) from 0 to 255.
    """

    def __init__(self, fill: Tensor):
        self.fill = fill
        self.luma = torch.tensor(LUMA).view(3, 1, 1)
        self.smoothing = torch.tensor(SMOOTHING).expand(3, 1, 3, 3).contiguous()
        self._coordinates: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def to(self, device: torch.device) -> "Constants":
        """Move the constants to `device`; moving them in each batch would synchronize."""
        for name in ("fill", "luma", "smoothing"):
            setattr(self, name, getattr(self, name).to(device))
        self._coordinates.clear()
        return self

    def coordinates(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return x (width, 1) and y (height, 1, 1) of pixel centers, from -1 to 1."""
        if (height, width) not in self._coordinates:
            device = self.fill.device
            x = torch.linspace(1 / width - 1, 1 - 1 / width, width, device=device)
            y = torch.linspace(1 / height - 1, 1 - 1 / height, height, device=device)
            self._coordinates = {(height, width): (x[:, None], y[:, None, None])}
        return self._coordinates[height, width]


# Families: `(levels, parameters, constants)` changes levels (images, 3, height, width) from 0 to 255 in place.


def blend(levels: Tensor, parameters: Tensor, constants: Constants) -> None:
    """Add weighted image, grayscale image and mean gray, and clamp.

    The parameters are the three weights. With a weight of the image above 1 the blend extrapolates.
    """
    image, gray, mean = _columns(parameters, 3)
    luma = (levels * constants.luma).sum(dim=1, keepdim=True)
    mean_luma = luma.mean(dim=(2, 3), keepdim=True)
    levels.mul_(image).addcmul_(luma, gray).addcmul_(mean_luma, mean).clamp_(0.0, 255.0)


def threshold(levels: Tensor, parameters: Tensor, constants: Constants) -> None:
    """Scale and shift levels of at least a limit, and add to those below it.

    The parameters are limit, scale, shift and addend.
    """
    limit, scale, shift, addend = _columns(parameters, 4)
    above = torch.addcmul(shift, levels, scale)
    torch.where(levels >= limit, above, levels + addend, out=levels)


def posterize(levels: Tensor, parameters: Tensor, constants: Constants) -> None:
    """Round down to multiples of the parameter."""
    (step,) = _columns(parameters, 1)
    levels.div_(step).floor_().mul_(step)


def sharpness(levels: Tensor, parameters: Tensor, constants: Constants) -> None:
    """Blend with the image smoothed by a 3x3 kernel, except for the border pixels.

    The parameter is the weight of the image.
    """
    (image,) = _columns(parameters, 1)
    smooth = F.conv2d(levels, constants.smoothing, groups=3).round_()
    inner = levels[..., 1:-1, 1:-1]
    inner.copy_(torch.lerp(smooth, inner, image).clamp_(0.0, 255.0))


def autocontrast(levels: Tensor, parameters: Tensor, constants: Constants) -> None:
    """Stretch each channel to the full range."""
    low, high = (value[..., None] for value in torch.aminmax(levels.flatten(2), dim=2, keepdim=True))
    extent = high - low
    varies = extent > 0
    levels.sub_(low * varies).mul_(torch.where(varies, 255.0 / extent, 1.0))


def equalize(levels: Tensor, parameters: Tensor, constants: Constants) -> None:
    """Flatten each channel's histogram."""
    levels.copy_(tv.equalize(levels.round().to(torch.uint8)))


def gaussian_blur(levels: Tensor, parameters: Tensor, constants: Constants) -> None:
    """Blur with a Gaussian; the parameter is its standard deviation in pixels."""
    reach = min(int(3 * MAX_BLUR), levels.shape[-1] - 1, levels.shape[-2] - 1)
    offsets = torch.arange(-reach, reach + 1, device=levels.device, dtype=levels.dtype)
    kernel = torch.exp(-0.5 * (offsets / parameters[:, :1].clamp(min=1e-3)) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    batch, channels, height, _ = levels.shape
    padded = F.pad(levels, (reach,) * 4, mode="reflect").reshape(1, batch * channels, height + 2 * reach, -1)
    kernel = kernel.repeat_interleave(channels, dim=0, output_size=batch * channels)[:, None]
    padded = F.conv2d(padded, kernel[:, :, None, :], groups=batch * channels)
    levels.copy_(F.conv2d(padded, kernel[:, :, :, None], groups=batch * channels).view_as(levels))


def affine(levels: Tensor, parameters: Tensor, constants: Constants) -> None:
    """Sample bilinearly at transformed coordinates, and fill uncovered pixels.

    The parameters are the two rows that are applied to (x, y, 1), from -1 to 1 within the image.
    """
    x, y = constants.coordinates(*levels.shape[-2:])
    by_x, by_y, shift = parameters.view(-1, 1, 1, 2, 3).unbind(-1)
    grid = torch.addcmul(torch.addcmul(shift, y, by_y), x, by_x)
    sampled = F.grid_sample(levels - constants.fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    torch.add(sampled, constants.fill, out=levels)


def _columns(parameters: Tensor, count: int) -> tuple[Tensor, ...]:
    return parameters[:, :count, None, None, None].unbind(1)


FAMILIES: dict[str, Callable[[Tensor, Tensor, Constants], None]] = {
    family.__name__: family
    for family in (blend, threshold, posterize, sharpness, autocontrast, equalize, gaussian_blur, affine)
}


# Operations: magnitudes (images,) -> parameters of the family. A blend of magnitude 0 is the degenerate image, 1 the
# image, above 1 extrapolates.


def _rows(*columns) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*columns), axis=1)


def _affine_rows(a, b, c, d, e, f, height: int, width: int) -> np.ndarray:
    """Convert rows applied to pixels from the center to `affine`'s."""
    return _rows(a, b * (height / width), c * (2.0 / width), d * (width / height), e, f * (2.0 / height))


def _rotation(m: np.ndarray, height: int, width: int) -> np.ndarray:
    cos, sin = np.cos(np.deg2rad(m)), np.sin(np.deg2rad(m))
    return _affine_rows(cos, -sin, 0.0, sin, cos, 0.0, height, width)


# Name -> family, and parameters as a function of (magnitudes, height, width).
OPERATIONS: dict[str, tuple[str, Callable[[np.ndarray, int, int], np.ndarray]]] = {
    "grayscale": ("blend", lambda m, h, w: _rows(0 * m, 1.0, 0.0)),
    "brightness": ("blend", lambda m, h, w: _rows(m, 0.0, 0.0)),
    "saturation": ("blend", lambda m, h, w: _rows(m, 1 - m, 0.0)),
    "contrast": ("blend", lambda m, h, w: _rows(m, 0.0, 1 - m)),
    "invert": ("threshold", lambda m, h, w: _rows(0 * m - np.inf, -1.0, 255.0, 0.0)),
    # Invert levels of at least the magnitude.
    "solarize": ("threshold", lambda m, h, w: _rows(m, -1.0, 255.0, 0.0)),
    # Add the magnitude, at most 127, to levels below 128.
    "solarize_add": ("threshold", lambda m, h, w: _rows(128.0, 1.0, 0.0, m)),
    # Keep the magnitude's bits of 8.
    "posterize": ("posterize", lambda m, h, w: _rows(np.exp2(8.0 - m))),
    "sharpness": ("sharpness", lambda m, h, w: _rows(m)),
    "autocontrast": ("autocontrast", lambda m, h, w: _rows(m)),
    "equalize": ("equalize", lambda m, h, w: _rows(m)),
    "gaussian_blur": ("gaussian_blur", lambda m, h, w: _rows(m)),
    # Shift each row by the magnitude times its distance from the top, or each column from the left.
    "shear_x": ("affine", lambda m, h, w: _affine_rows(1.0, m, m * h / 2, 0.0, 1.0, 0.0, h, w)),
    "shear_y": ("affine", lambda m, h, w: _affine_rows(1.0, 0.0, 0.0, m, 1.0, m * w / 2, h, w)),
    # Move to the right or down by a fraction of the side.
    "translate_x": ("affine", lambda m, h, w: _affine_rows(1.0, 0.0, -m * w, 0.0, 1.0, 0.0, h, w)),
    "translate_y": ("affine", lambda m, h, w: _affine_rows(1.0, 0.0, 0.0, 0.0, 1.0, -m * h, h, w)),
    # Rotate by the magnitude in degrees, counterclockwise about the center.
    "rotate": ("affine", _rotation),
}
IDENTITY = "identity"  # an operation that changes nothing


def parameters_of(name: str, magnitudes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the parameters (images, NUM_PARAMETERS) float32 of an operation.

    Args:
        name: one of `OPERATIONS`.
        magnitudes: magnitude of each image (images,).
        height: height of the images in pixels.
        width: width of the images in pixels.
    """
    found = np.zeros((len(magnitudes), NUM_PARAMETERS), dtype=np.float32)
    values = OPERATIONS[name][1](np.asarray(magnitudes, dtype=np.float64), height, width)
    found[:, : values.shape[1]] = values
    return found
