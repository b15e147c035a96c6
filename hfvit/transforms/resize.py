"""Batched antialiased crop and resize, and crops of padded images.

Both passes of a resize are matrix products.
"""

import math

import torch


def resize_boxes(
    images: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor, size: tuple[int, int], interpolation: str
) -> torch.Tensor:
    """Crop each image to its box, resize it and flip it.

    Args:
        images: (batch, channels, height, width) of any float type, in which the result is computed.
        boxes: (batch, 4) of top, left, height, width in pixels; pixels outside a box have no influence.
        flips: (batch, 2) bool, horizontal and vertical flips.
        size: (height, width) in pixels of the result.
        interpolation: one of `FILTERS`.

    Returns:
        Images (batch, channels, *size), not clamped although bicubic and Lanczos filters overshoot.
    """
    batch, channels, height, width = images.shape
    starts, lengths = boxes.float().view(batch, 2, 2).permute(1, 2, 0)  # (axis, batch) each
    if size[0] == size[1]:  # both axes together, as each of many small kernels costs a launch
        mirrored = torch.cat([flips[:, 1], flips[:, 0]])
        longest = max(height, width)
        weights = filter_weights(starts.reshape(-1), lengths.reshape(-1), longest, size[0], interpolation, mirrored)
        weights = weights.to(images.dtype)
        rows, columns = weights[:batch, :, :height], weights[batch:, :, :width]
    else:
        rows = filter_weights(starts[0], lengths[0], height, size[0], interpolation, flips[:, 1])
        columns = filter_weights(starts[1], lengths[1], width, size[1], interpolation, flips[:, 0])
        rows, columns = rows.to(images.dtype), columns.to(images.dtype)
    resized = torch.matmul(rows[:, None], images)  # (batch, channels, size[0], width)
    resized = torch.bmm(resized.view(batch, channels * size[0], width), columns.transpose(1, 2))
    return resized.view(batch, channels, *size)


def crop_padded(
    images: torch.Tensor,
    offsets: torch.Tensor,
    padding: int,
    mode: str,
    fill: torch.Tensor,
    flips: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pad each image, crop it to its original size, and flip it.

    Equals torchvision's `RandomCrop(size, padding=padding, padding_mode=mode)` with the same offsets.

    Args:
        images: (batch, channels, height, width).
        offsets: (batch, 2) of top and left in the padded image, integers from 0 to `2 * padding`.
        padding: number of pixels on each side; below height and width for `mode="reflect"`.
        mode: one of `recipe.arguments.PADDING_MODES`.
        fill: value of the padding for `mode="constant"`, of a shape that broadcasts to (channels, 1, 1).
        flips: (batch, 2) bool, horizontal and vertical flips after the crop, or None.

    Returns:
        Images of the same shape.
    """
    batch, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) + (offsets[:, :1] - padding)  # of the image, (batch, height)
    columns = torch.arange(width, device=images.device) + (offsets[:, 1:] - padding)
    if flips is not None:
        columns = torch.where(flips[:, :1], columns.flip(1), columns)
        rows = torch.where(flips[:, 1:], rows.flip(1), rows)
    inside = None
    if mode == "reflect":
        rows = (height - 1) - ((height - 1) - rows.abs()).abs()
        columns = (width - 1) - ((width - 1) - columns.abs()).abs()
    else:
        row_inside = (rows >= 0) & (rows < height)
        column_inside = (columns >= 0) & (columns < width)
        inside = row_inside[:, None, :, None] & column_inside[:, None, None, :]
        rows = rows.clamp(0, height - 1)
        columns = columns.clamp(0, width - 1)
    image = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    shifted = images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return shifted if inside is None else torch.where(inside, shifted, fill.to(images.dtype))


def resize_as_pillow(
    images: torch.Tensor, resized: tuple[int, int], crop: tuple[int, int, int, int], interpolation: str
) -> torch.Tensor:
    """Resize and crop uint8 images, bit-exact with Pillow (12.3 and 13 tested).

    Pillow uses fixed-point weights, resizes horizontally and then vertically, and rounds to 8 bits after each pass;
    float64 represents the sums exactly. Images that shrink in height may be resized vertically first, so only square
    to square is supported for them.

    Args:
        images: (batch, channels, height, width) uint8.
        resized: (height, width) in pixels after resizing, before the crop.
        crop: (top, left, height, width) within the resized image.
        interpolation: one of `FILTERS`.

    Returns:
        Images (batch, channels, crop height, crop width), float32 integers from 0 to 255.
    """
    height, width = images.shape[-2:]
    top, left, crop_height, crop_width = crop
    # MPS has no float64; in float32, ties may be rounded differently from Pillow.
    dtype = torch.float32 if images.device.type == "mps" else torch.float64
    zero = torch.zeros(1, device=images.device, dtype=dtype)
    rows = _fixed_point(filter_weights(zero, zero + height, height, resized[0], interpolation)[0])
    columns = _fixed_point(filter_weights(zero, zero + width, width, resized[1], interpolation)[0])
    rows = rows[top : top + crop_height]
    columns = columns[left : left + crop_width].T
    levels = images.to(dtype, memory_format=torch.contiguous_format)
    return _to_levels(torch.matmul(rows, _to_levels(torch.matmul(levels, columns)))).to(torch.float32)


def _fixed_point(weights: torch.Tensor) -> torch.Tensor:
    """Round to multiples of 2^-22, halves away from zero."""
    return torch.trunc(weights * 2.0**22 + 0.5 * weights.sign()) / 2.0**22


def _to_levels(values: torch.Tensor) -> torch.Tensor:
    return values.add_(0.5).floor_().clamp_(0.0, 255.0)


def filter_weights(
    start: torch.Tensor,
    length: torch.Tensor,
    size_in: int,
    size_out: int,
    interpolation: str,
    flips: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the weights of an antialiased resize along one axis.

    Args:
        start: first pixel of each box (batch,).
        length: length of each box in pixels (batch,).
        size_in: length of the axis before resizing.
        size_out: length of the axis after resizing.
        interpolation: one of `FILTERS`.
        flips: (batch,) bool, or None.

    Returns:
        Weights (batch, size_out, size_in) whose rows sum to one.
    """
    filter_function, support = FILTERS[interpolation]
    start = start[:, None]
    length = length[:, None]
    out = torch.arange(0.5, size_out, device=start.device, dtype=start.dtype)
    if flips is not None:
        out = torch.where(flips[:, None], size_out - out, out)
    scale = length / size_out
    widened = scale.clamp(min=1.0)
    center = start + out * scale
    first = (center - support * widened - 0.5).floor()
    taps = 2 * math.ceil(support * max(1.0, size_in / size_out)) + 2
    pixel = first[..., None] + torch.arange(taps, device=start.device, dtype=start.dtype)
    weights = filter_function((pixel + 0.5 - center[..., None]).abs_() / widened[..., None])
    weights *= (pixel >= start[..., None]) & (pixel < (start + length)[..., None])
    weights /= weights.sum(-1, keepdim=True)
    dense = weights.new_zeros(len(start), size_out, size_in)
    return dense.scatter_add_(2, pixel.clamp_(0, size_in - 1).long(), weights)


def _bilinear(x: torch.Tensor) -> torch.Tensor:
    return (1.0 - x).clamp(min=0.0)


def _bicubic(x: torch.Tensor) -> torch.Tensor:
    """Evaluate Keys' cubic convolution (doi.org/10.1109/TASSP.1981.1163711, a = -0.5)."""
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def _lanczos(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 3.0, torch.sinc(x) * torch.sinc(x / 3.0), torch.zeros_like(x))


# Filter function and radius in pixels.
FILTERS = {"bilinear": (_bilinear, 1.0), "bicubic": (_bicubic, 2.0), "lanczos": (_lanczos, 3.0)}
