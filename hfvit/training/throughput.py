"""Throughput, data wait, FLOPs and MFU."""

import logging
import time
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from hfvit.models.factory import meta_copy
from hfvit.utils.matmul import wait

logger = logging.getLogger(__name__)


class SpeedMeter(TrainerCallback):
    """Count images and seconds of training, without evaluation and saving.

    Its values are to be read after a synchronization with the device, such as when the Trainer logs a loss.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.flops_per_image: float | None = None
        self.peak_flops: float | None = None
        self.datasheet_flops: float | None = None
        self.start()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.stop()

    def start(self) -> None:
        """Start counting."""
        self.images = 0
        self.waited = 0.0
        self.paused_for = 0.0
        self._first = self._last = self._stopped = self._reading()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def stop(self) -> None:
        """Set the end of `overall` when the device has finished its work.

        A later call extends it.
        """
        wait(self.device)
        self._stopped = self._reading()

    @contextmanager
    def waiting(self):
        """Count the time within the context as data wait."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self):
        """Exclude the time within the context, which may be nested."""
        start = time.perf_counter()
        before = self.paused_for
        try:
            yield
        finally:
            self.paused_for = before + time.perf_counter() - start  # with that of inner contexts

    def since_last(self) -> dict[str, float]:
        """Return the throughput since the last call."""
        last, self._last = self._last, self._reading()
        return self._figures(last, self._last)

    def overall(self) -> dict[str, float]:
        """Return the throughput from `start` to the last `stop`."""
        return self._figures(self._first, self._stopped)

    def _reading(self) -> tuple[int, float, float]:
        return self.images, time.perf_counter() - self.paused_for, self.waited

    def _figures(self, before, after) -> dict[str, float]:
        images, seconds, waited = (new - old for new, old in zip(after, before, strict=True))
        seconds = max(seconds, 1e-9)
        figures = {"images_per_second": images / seconds, "data_wait": waited / seconds}
        for name, peak in (("mfu", self.peak_flops), ("mfu_datasheet", self.datasheet_flops)):
            if self.flops_per_image and peak:
                figures[name] = images / seconds * self.flops_per_image / peak
        if self.device.type == "cuda":
            figures["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return figures


def training_flops(model: nn.Module) -> float | None:
    """Count the FLOPs of an image's forward and backward pass (multiply-add is two).

    The model runs on the meta device. Recomputed activations do not count. Returns None if the model cannot run there.
    """
    try:
        meta_model = meta_copy(model).train()
        with torch.device("meta"):
            image = torch.zeros(2, 3, *model.config.image_size)  # some norms need more than one image
            with FlopCounterMode(display=False) as counter:
                tokens = getattr(model.config, "max_text_length", None)  # image-text models only
                texts = {"input_ids": torch.zeros(2, tokens, dtype=torch.long)} if tokens else {}
                # Sums rows of the logits, or a pair of logits of a distilled student.
                sum(logits.sum() for logits in meta_model(image, **texts).logits).backward()
    except Exception as error:  # timm's models raise various types, and a statistic must not end a run
        logger.debug("Cannot count the FLOPs of %s: %s", model.config.architecture, error)
        return None
    return counter.get_total_flops() / 2


# Dense FLOP/s in bf16 and fp16 of NVIDIA's datasheets, by a part of the GPU's name; the first match applies.
DATASHEET_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12,
    "A40": 149.7e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "V100": 125e12, "T4": 65e12,
}  # fmt: skip


def datasheet_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the dense FLOPs per second that NVIDIA states for a GPU.

    Returns None for other devices and for float32.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in DATASHEET_FLOPS.items() if part in name), None)
