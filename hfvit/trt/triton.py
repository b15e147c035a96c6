"""Files of a Triton model repository."""

import json
import re

from hfvit.artifacts.engine_record import BuiltEngine
from hfvit.errors import ModelError

CONFIG, LABELS, PLAN = "config.pbtxt", "labels.txt", "1/model.plan"
TYPES = {"FLOAT": "TYPE_FP32", "HALF": "TYPE_FP16", "BF16": "TYPE_BF16"}
QUEUE_DELAY_US = 1000  # how long Triton may delay a request to fill a batch


def check_triton(name: str, min_batch: int) -> None:
    """Raise `ModelError` for an invalid model name or a profile without batch size 1."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ModelError(f"--triton: the model name must consist of letters, digits, '-', '_' and '.', got '{name}'.")
    if min_batch > 1:
        raise ModelError(
            f"--triton: requires --min_batch 1, got {min_batch}. Triton may send batches of a single image."
        )


def triton_config(name: str, engine: BuiltEngine) -> str:
    """Render the config.pbtxt of an engine, with dynamic batching."""
    _, best, largest = engine.profile.batches
    lines = [f"name: {json.dumps(name)}", 'platform: "tensorrt_plan"', f"max_batch_size: {largest}"]
    for kind, tensor in (("input", engine.input), ("output", engine.output)):
        label = f"\n    label_filename: {json.dumps(LABELS)}" if kind == "output" else ""
        lines.append(
            f"{kind} [\n  {{\n    name: {json.dumps(tensor.name)}\n    data_type: {TYPES[tensor.type]}\n"
            f"    dims: [ {', '.join(map(str, tensor.shape[1:]))} ]{label}\n  }}\n]"
        )
    preferred = sorted({best, largest})
    lines.append(
        f"dynamic_batching {{\n  preferred_batch_size: [ {', '.join(map(str, preferred))} ]\n"
        f"  max_queue_delay_microseconds: {QUEUE_DELAY_US}\n}}"
    )
    lines.append("instance_group [\n  {\n    count: 1\n    kind: KIND_GPU\n  }\n]")
    return "\n".join(lines) + "\n"


def triton_labels(labels: list[str]) -> str:
    """Render labels.txt: one class per line, in the order of the logits."""
    return "".join(" ".join(label.split()) + "\n" for label in labels)
