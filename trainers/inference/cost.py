"""What an evaluation costs: operations, parameters, time and memory."""

from pathlib import Path
from typing import Any

import torch

from bigbatch.configs.files import to_json
from bigbatch.trainers.inference.forward import Forward
from bigbatch.trainers.models.compressed import compression_of
from bigbatch.trainers.models.size import count_flops
from bigbatch.trainers.monitoring.flops import forward_flops


def cost_of(forward: Forward, images: int, seconds: float) -> dict[str, Any]:
    """Of `images` in `seconds`, by all members and looks together.

    `flops_per_image` is None where a model's operations cannot be counted. `peak_memory`, in
    bytes, is this rank's: of its GPU, or of its whole process on a CPU.
    """
    counted: dict[str, int | None] = {}
    flops: list[int | None] = []
    for member in forward.members:
        recipe, data = member.recipe, member.recipe.data
        if compression_of(member.weights) is not None:  # the recipe's model is larger
            flops.append(count_flops(member.build(), data.channels, recipe.eval_size))
            continue
        key = to_json([recipe.model.model_dump(), recipe.eval_size])
        if key not in counted:
            counted[key] = forward_flops(recipe, forward.classes, recipe.eval_size)
        flops.append(counted[key])
    known = [count for count in flops if count is not None]
    return {
        "flops_per_image": sum(known) * forward.passes if len(known) == len(flops) else None,
        "parameters": forward.parameters,
        "images_per_s": round(images / seconds, 1),
        "seconds": round(seconds, 3),
        "ranks": forward.engine.world,
        "device": _device(forward.engine.device),
        "peak_memory": _peak_memory(forward.engine.device),
    }


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage, whose ru_maxrss a process inherits from the one that started it.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return found[0] * 1024 if found else None
