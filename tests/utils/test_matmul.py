"""`matmul_rate`, and the warning about slow precisions."""

import logging
import math
from functools import cache

import pytest
import torch

from hfvit.utils import matmul
from hfvit.utils.matmul import matmul_rate, peak_rate, times_slower, warn_if_slow

CPU = torch.device("cpu")


def test_matmul_rate_is_positive():
    rate = matmul_rate(CPU, torch.float32)
    assert math.isfinite(rate)
    assert rate > 1e8


def test_measurement_of_a_slow_precision_ends_early(monkeypatch):
    products = []
    monkeypatch.setattr(matmul, "LONGEST", 0.0)
    monkeypatch.setattr(torch, "matmul", lambda a, b: products.append(a @ b))
    matmul_rate(CPU, torch.float32)
    assert len(products) == 1


def test_slow_precision_is_measured_once(monkeypatch):
    def measure(device, dtype, side=None):
        measured.append(dtype)
        return {torch.float32: 100e9, torch.bfloat16: 2e9}[dtype]

    measured = []
    monkeypatch.setattr(matmul, "matmul_rate", measure)
    monkeypatch.setattr(matmul, "times_slower", cache(times_slower.__wrapped__))
    assert peak_rate.__wrapped__(CPU, torch.bfloat16, None) == 2e9
    warn_if_slow("bf16", CPU, torch.bfloat16)
    assert measured.count(torch.bfloat16) == 1


@pytest.mark.parametrize(("rate", "warnings"), [(1e9, 1), (60e9, 0), (200e9, 0)])
def test_warning_names_a_precision_that_is_slower_than_float32(monkeypatch, caplog, rate, warnings):
    rates = {torch.float32: 100e9, torch.bfloat16: rate}
    monkeypatch.setattr(matmul, "matmul_rate", lambda device, dtype, side: rates[dtype])
    monkeypatch.setattr(matmul, "times_slower", times_slower.__wrapped__)  # without its cache
    with caplog.at_level(logging.WARNING):
        warn_if_slow("bf16", CPU, torch.bfloat16)
        warn_if_slow("bf16", CPU, torch.float32)
    assert len(caplog.records) == warnings
    for record in caplog.records:
        assert record.getMessage().startswith("bf16: ")
        assert "100 times" in record.getMessage()
