"""`bigbatch find-micro-batch`: the largest micro-batch that fits, by real runs of a few steps.

A probe is a run of the recipe on all ranks, so a rank that runs out of memory ends it for all
of them: what fits is what fits on every rank. On a GPU the allocator says when memory is
out. On the host it would be the kernel, by killing something; so the processes of a probe
are measured while they run, and stopped at a limit.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import parse_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.configs.schema import Recipe
from bigbatch.launcher.child import Children, RunFailed, bare_recipe, tail
from bigbatch.trainers.planning.plan import check_world
from bigbatch.trainers.recovery.oom import OUT_OF_MEMORY

_STEPS = 3  # the first makes gradients and optimizer state, the second holds both at its peak
_SHARE = 0.9  # of what is free now


@dataclass(frozen=True)
class Probe:
    """One micro-batch size, tried. Memory is the host's, of all processes together."""

    micro_batch: int
    fits: bool
    images_per_s: float | None
    peak_bytes: int


def sizes(recipe: Recipe, world: int) -> list[int]:
    """Divisors of global_batch that the recipe allows and that give each rank work, rising.

    Where the batch changes, of each of its values; ranks then have work in the largest, on
    backends that let none wait in the smallest.
    """
    batch = recipe.common_batch
    found = []
    for size in range(1, min(batch, recipe.largest_batch // world) + 1):
        if batch % size == 0:
            try:
                tree = recipe.model_dump(mode="json") | {"micro_batch": size}
                check_world(parse_recipe(tree, "tried"), world)
            except UserError:
                continue  # such as lanes that no longer divide a step
            found.append(size)
    if not found:
        raise UserError(
            f"no micro_batch divides global_batch {batch} and leaves work for {world} ranks; "
            "use fewer ranks"
        )
    return found


def probe_recipe(recipe: Recipe, micro_batch: int, world: int) -> Recipe:
    """A few steps with one or two micro-batches on each rank, and nothing beside them."""
    each = min(2, recipe.largest_batch // (micro_batch * world))
    tree = bare_recipe(recipe, _STEPS)
    tree["micro_batch"] = micro_batch
    tree["global_batch"] = micro_batch * world * each
    # They decide which samples come, and must fit the step.
    tree["data"] |= {"lanes": 0, "repeats": 1}
    tree["optimizer"]["lr"] *= 1e-6  # the loss is of no interest, but must stay finite
    tree["schedule"] = {"name": "constant"}
    return parse_recipe(tree, "of the probe")


def probe(
    recipe: Recipe, micro_batch: int, world: int, folder: Path, limit: int, children: Children
) -> Probe:
    """Run it; raises RunFailed where it fails for another reason than memory.

    What it shares with the process that it is forked from counts: a run alone has it to itself.
    """
    run = create_run(folder / f"micro-{micro_batch}", probe_recipe(recipe, micro_batch, world))
    child = children.start(run, _STEPS)
    peak = 0

    def watch() -> None:
        nonlocal peak
        peak = max(peak, tree_memory(child.process.pid, children.parent.pid))
        if peak > limit:
            child.kill()

    status = child.wait(watch)
    output = tail(run, 40)
    records = [r for r in read_jsonl(run.metrics) if r["kind"] == "train"]
    if status == 0:
        return Probe(micro_batch, peak <= limit, records[-1]["images_per_s"], peak)
    if peak > limit or OUT_OF_MEMORY in output:
        return Probe(micro_batch, False, None, peak)
    raise RunFailed(f"micro_batch {micro_batch}: the probe ended with status {status}:\n{output}")


def find(
    recipe: Recipe,
    world: int,
    folder: Path,
    limit: int,
    say: Callable[[Probe], None] = lambda probe: None,
) -> list[Probe]:
    """Probes by bisection, in the order made; the largest that fits is the answer.

    Raises UserError where not even the smallest one fits.
    """
    tried: list[Probe] = []
    left = sizes(recipe, world)
    with Children(world) as children:
        while left:
            middle = len(left) // 2
            found = probe(recipe, left[middle], world, folder, limit, children)
            tried.append(found)
            say(found)
            left = left[middle + 1 :] if found.fits else left[:middle]
    if not any(p.fits for p in tried):
        raise UserError(
            f"not even micro_batch {tried[-1].micro_batch} fits into {limit / 1e9:.2f} GB of host "
            "memory and the GPU's; use a smaller model or image_size, or fewer ranks on a machine"
        )
    return tried


def tree_memory(*pids: int) -> int:
    """Bytes of processes and their descendants, shared pages counted once (PSS)."""
    found: set[int] = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(pid)
            found |= {pid, *(p.pid for p in top.children(recursive=True))}
    return sum(_pss(pid) for pid in found)


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it has ended
    return 0


def free_memory() -> int:
    """Bytes that processes may take here: free ones, less what a control group keeps away."""
    free = [psutil.virtual_memory().available]
    for limit, used in _cgroups():
        try:
            most = limit.read_text().strip()
            if most.isdecimal():
                free.append(int(most) - int(used.read_text()))
        except (OSError, ValueError):
            continue
    return int(_SHARE * max(0, min(free)))


def _cgroups() -> list[tuple[Path, Path]]:
    """Files (limit, usage) of the groups that this process is in, version 2 or 1."""
    root = Path("/sys/fs/cgroup")
    first = root / "memory"
    found = [(first / "memory.limit_in_bytes", first / "memory.usage_in_bytes")]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        if line.startswith("0::"):
            group = root / line[3:].lstrip("/")
            groups = [p for p in (group, *group.parents) if p.is_relative_to(root)]
            found += [(path / "memory.max", path / "memory.current") for path in groups]
    return found
