"""Settings of the process after a call of the library."""

import os
import random

import numpy as np
import torch
from transformers import enable_full_determinism

from hfvit.utils.environment import set_tf32
from hfvit.utils.global_state import kept_state, kept_tf32, tf32_mode

MODULES = (torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def tf32() -> list:
    legacy = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    return legacy + [module.fp32_precision for module in MODULES]


def test_random_generators_and_determinism_are_restored():
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    variables = dict(os.environ)
    with kept_state():
        expected = draw()
    with kept_state():
        draw()
        enable_full_determinism(3)
        torch.backends.cudnn.benchmark = True
    assert draw() == expected
    assert dict(os.environ) == variables
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark


def test_gpus_first_used_in_the_context_get_the_seed_of_the_cpu(monkeypatch):
    seeds = []
    with kept_state():
        torch.manual_seed(7)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(seeds))
        with kept_state():
            torch.manual_seed(3)
        assert seeds == [3, 7]


def test_tf32_is_restored_from_each_way_to_set_it():
    with kept_tf32():
        for setting in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = setting
            before = tf32()
            for enabled in (True, False):
                with tf32_mode(enabled):
                    assert torch.backends.cuda.matmul.allow_tf32 == enabled
                    assert torch.backends.cudnn.allow_tf32 == enabled
                assert tf32() == before
            with tf32_mode(None):
                assert tf32() == before
        set_tf32(False)
        before = tf32()
        with tf32_mode(True):
            pass
        assert tf32() == before


def test_tf32_is_restored_by_the_last_of_concurrent_contexts():
    with kept_tf32():
        set_tf32(False)
        before = tf32()
        first, second = tf32_mode(True), tf32_mode(True)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.backends.cuda.matmul.allow_tf32
        second.__exit__(None, None, None)
        assert tf32() == before
