"""In what the machine of a replay differs from the one that made the step, as far as is known."""

import os
from importlib import metadata
from typing import Any

import torch

from bigbatch.configs.json_text import parse_json
from bigbatch.trainers.planning.environment import recorded_variables
from bigbatch.trainers.replay.past import Past

_VERSIONS = ("bigbatch", "torch", "timm", "numpy", "kornia")  # of those that compute


def differences(past: Past, device: torch.device) -> list[str]:
    """A line for each: device, instruction set, variables, versions, and how gradients are added.

    Threads are not among them: a replay takes as many as the step had. Versions are those that the
    run began with.
    """
    then = past.attempt(past.step)
    found = []
    if then.get("device") and str(then["device"]).partition(":")[0] != device.type:
        found.append(f"device {then['device']} then, {device} here")
    capability = torch.backends.cpu.get_cpu_capability()
    if then.get("cpu_capability") not in (None, capability):
        found.append(f"CPU instructions {then['cpu_capability']} then, {capability} here")
    variables = then.get("environment")
    recorded: dict[str, Any] = variables if isinstance(variables, dict) else {}
    here = recorded_variables(os.environ)
    names = sorted(recorded.keys() | here.keys()) if then else []
    found += [
        f"{name}={recorded.get(name)} then, {here.get(name)} here"
        for name in names
        if name != "OMP_NUM_THREADS" and recorded.get(name) != here.get(name)
    ]
    found += _versions(past)
    world = then.get("world_size")
    world = world if type(world) is int else 1
    if past.recipe.reduction != "exact" and world > 1:
        found.append(
            f"reduction: {past.recipe.reduction} adds gradients up in an order that depends on "
            f"the ranks: {world} then, 1 here (reduction: exact does not)"
        )
    return found


def _versions(past: Past) -> list[str]:
    try:
        then = parse_json(past.run.manifest.read_bytes())["versions"]
        pairs = [(name, then[name], _version(name)) for name in _VERSIONS if name in then]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [f"{name} {old} then, {new} here" for name, old, new in pairs if old != new]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
