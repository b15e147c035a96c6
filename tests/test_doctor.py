"""`hfvit doctor` on this machine, and with files of others."""

import onnxruntime
import pytest
import torch
from helpers.messages import assert_names

from hfvit.cli import main
from hfvit.doctor import driver_version, gpu_precisions, processor_flags
from hfvit.trt.api import INSTALL, load_backend


def test_doctor_reports_this_machine(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    captured = capsys.readouterr().out
    assert stop.value.code == 0
    assert torch.__version__ in captured
    assert onnxruntime.__version__ in captured
    for provider in onnxruntime.get_available_providers():
        assert provider.removesuffix("ExecutionProvider") in captured
    for name in ("tensorrt", "tensorrt_rtx"):
        backend = load_backend(name)
        assert (INSTALL[name] if isinstance(backend, str) else backend.version) in captured
    for index in range(torch.cuda.device_count()):
        assert torch.cuda.get_device_name(index) in captured
    assert_names(captured, "fp32", "int8")


def test_driver_version_and_processor_flags_of_other_machines(tmp_path):
    file = tmp_path / "version"
    assert driver_version(file) is None
    for line, expected in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("something else", None),
    ):
        file.write_text(line + "\nGCC version:  gcc version 11.4.0\n")
        assert driver_version(file) == expected
    assert processor_flags(file) == set()
    file.write_text("processor\t: 0\nflags\t\t: fpu avx512_vnni avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert processor_flags(file) == {"fpu", "avx512_vnni", "avx512_bf16"}


@pytest.mark.parametrize(
    ("capability", "worth"),
    [("6.1", ["fp32"]), ("7.0", ["fp16"]), ("7.5", ["fp16", "int8"]), ("8.6", ["tf32", "bf16", "fp16", "int8"]),
     ("12.0", ["tf32", "bf16", "fp16", "int8", "fp8"])],
)  # fmt: skip
def test_gpu_precisions_by_compute_capability(capability, worth):
    assert gpu_precisions(capability) == worth
