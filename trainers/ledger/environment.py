"""What the bits of a step depend on beside recipe, data and ranks."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.backends.cuda
import torch.backends.cudnn

from bigbatch.configs.files import to_json
from bigbatch.trainers.planning.environment import recorded_variables


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions and settings that decide how sums are rounded, and an id of them all."""
    on_gpu = device.type == "cuda"
    found = {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "variables": recorded_variables(os.environ),
    }
    if torch.are_deterministic_algorithms_enabled():  # otherwise the id is that of older versions
        found["deterministic"] = True
    name = hashlib.sha256(to_json(found).encode()).hexdigest()[:16]
    return {"environment": name, **found}


def _cpu() -> str:
    """The processor's model: libraries choose their kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "cpu"
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else "cpu"
