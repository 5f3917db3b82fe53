"""The default test suite for benchmarks/startup.py: of two trees, the tests that both have."""

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

_PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q")


def _environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree / "typings")}


def collected(tree: Path) -> dict[str, list[str]]:
    """Ids of the default suite's tests, by what follows the file: tests have moved."""
    done = subprocess.run(
        [*_PYTEST, "--collect-only"],
        cwd=tree,
        env=_environment(tree),
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, list[str]] = defaultdict(list)
    for line in done.stdout.splitlines():
        _, has, name = line.partition("::")
        if has:
            found[name].append(line)
    if done.returncode or not found:
        raise SystemExit(f"tests of {tree}:\n{done.stdout[-2000:]}{done.stderr}")
    return found


def suite(trees: dict[str, Path]) -> Callable[[Path, Path, str], dict[str, float]]:
    """A measurement of the tests, as many of each name as all trees have, two files at a time.

    Raises SystemExit where one of them fails.
    """
    by_tree = {tree: collected(tree) for tree in trees.values()}
    first, *others = by_tree.values()
    count = {
        name: min(len(ids), *(len(o.get(name, ())) for o in others)) for name, ids in first.items()
    }

    def measure(tree: Path, folder: Path, name: str) -> dict[str, float]:
        ids = [i for each, most in count.items() for i in by_tree[tree].get(each, [])[:most]]
        listed = folder / f"{name}.tests"
        listed.write_text("\n".join(ids))
        begun = time.perf_counter()
        done = subprocess.run(
            [*_PYTEST, "-n", "2", "--dist", "loadfile", f"@{listed}"],
            cwd=tree,
            env=_environment(tree),
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - begun
        if done.returncode:
            raise SystemExit(f"tests of {tree}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
        return {"seconds": seconds, "tests": len(ids)}

    return measure
