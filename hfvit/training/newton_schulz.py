"""Precision of the Newton-Schulz iterations of Muon."""

from functools import partial

import torch
from timm.optim import muon

from hfvit.utils.matmul import is_slow

IN_BFLOAT16 = muon.zeropower_via_newtonschulz  # here, as a step that raises leaves the other one in timm


def avoid_slow_bfloat16(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Compute timm's Muon in float32 if bfloat16 is slow on a device.

    timm computes the iterations in bfloat16 (1.0.31), which PyTorch emulates on CPUs without AVX-512. That takes 28
    times as long for the matrices of a ViT-S (AMD EPYC, Zen 3).

    Args:
        optimizer: `timm.optim.Muon`, or `Lookahead` around it.
        device: device of the weights.
    """
    if not is_slow(device, torch.bfloat16):
        return
    in_float32 = partial(IN_BFLOAT16, dtype=torch.float32)
    optimizer = vars(optimizer).get("_base_optimizer", optimizer)  # PyTorch calls no hooks of Lookahead
    optimizer.register_step_pre_hook(lambda *_: setattr(muon, IN_BFLOAT16.__name__, in_float32))
    optimizer.register_step_post_hook(lambda *_: setattr(muon, IN_BFLOAT16.__name__, IN_BFLOAT16))
