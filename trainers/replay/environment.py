"""In what the machine of a replay differs from the one that made the step, as far as is known."""

import os
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch

from bigbatch.configs.identity import tree_differences
from bigbatch.configs.json_text import parse_json
from bigbatch.trainers.ledger.environment import environment
from bigbatch.trainers.planning.environment import asks_for_cpu, recorded_variables
from bigbatch.trainers.replay.past import Past, Record

_COMPARED = ("device", "torch", "cuda", "cudnn", "isa", "tf32")  # of a ledger's start
_VERSIONS = ("bigbatch", "torch", "timm", "numpy", "kornia")  # of those that compute


def differences(past: Past, device: torch.device) -> list[str]:
    """A line for each: device, instruction set, variables, versions, and how gradients are added.

    Of all attempts that made the steps of the replay. Threads are not among them: a replay takes as
    many as each step had. Versions are those that the run began with.
    """
    found: dict[str, None] = {}
    for then in past.attempts_until(past.step):
        found |= dict.fromkeys(_of_attempt(then, device))
    found |= dict.fromkeys(_versions(past))
    for then in past.attempts_until(past.step):
        world = then.get("world_size")
        if past.recipe.reduction != "exact" and type(world) is int and world > 1:
            line = (
                f"reduction: {past.recipe.reduction} adds gradients up in an order that depends on "
                f"the ranks: {world} then, 1 here (reduction: exact does not)"
            )
            found[line] = None
    if device.type == "cuda":
        found["a GPU's kernels may add up in another order from one time to the next"] = None
    return list(found)


def _of_attempt(then: Record, device: torch.device) -> Iterator[str]:
    if then.get("device") and str(then["device"]).partition(":")[0] != device.type:
        yield f"device {then['device']} then, {device} here"
    capability = torch.backends.cpu.get_cpu_capability()
    if then.get("cpu_capability") not in (None, capability):
        yield f"CPU instructions {then['cpu_capability']} then, {capability} here"
    variables = then.get("environment")
    recorded: dict[str, Any] = variables if isinstance(variables, dict) else {}
    now = recorded_variables(os.environ)
    for name in sorted(recorded.keys() | now.keys()):
        if name != "OMP_NUM_THREADS" and recorded.get(name) != now.get(name):
            yield f"{name}={recorded.get(name)} then, {now.get(name)} here"


def here() -> dict[str, Any]:
    """This machine, as a ledger's start has it."""
    cpu = asks_for_cpu(os.environ) or not torch.cuda.is_available()
    return environment(torch.device("cpu" if cpu else "cuda"))


def ledger_differences(start: Mapping[str, Any], device: torch.device) -> list[str]:
    """Likewise of a ledger's line of kind start, which knows the processor and the libraries."""
    now = environment(device)
    return tree_differences(
        {name: start[name] for name in _COMPARED if name in start},
        {name: now[name] for name in _COMPARED if name in start},
        ("then", "here"),
    )


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
