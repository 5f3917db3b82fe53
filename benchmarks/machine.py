"""What every benchmark shares: its arguments, and what its results say of where they come from."""

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def benchmark_parser(
    doc: str | None, *, quick: str, json_help: str = "write the figures into this file"
) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes, under the first line of its `doc`."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help=json_help)
    return parser


def lacks_cifar10(parser: argparse.ArgumentParser, path: Path | None) -> bool:
    """Whether --cifar10 is not given, which is said: there is nothing to do. Ends where it is no
    file."""
    if path is None:
        print("skipped: give CIFAR-10 as Parquet by --cifar10")
        return True
    if not path.is_file():
        parser.error(f"{path} is no file; give CIFAR-10 as Parquet")
    return False


def write_figures(path: Path | None, **figures: Any) -> None:
    """Write the figures as JSON where --json named a file; one of them is the `machine`."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")


def machine(*packages: str, **more: Any) -> dict[str, Any]:
    """Date, hardware, system and versions, of torch's device too where it is one of the packages.

    `more` is what else the figures depend on, such as threads and rounds.
    """
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
    }
    if "torch" in packages:
        import torch

        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        found["threads"] = torch.get_num_threads()
    return {**found, **more}


def stopwatch(*, on_gpu: bool) -> Callable[[Callable[[], T]], tuple[float, T]]:
    """What times a call: seconds of the processor, or of the clock until a GPU is done, and what
    the call gives."""
    clock = time.perf_counter if on_gpu else time.process_time

    def timed(call: Callable[[], T]) -> tuple[float, T]:
        started = clock()
        result = call()
        if on_gpu:
            import torch

            torch.cuda.synchronize()
        return clock() - started, result

    return timed


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # bigbatch itself, run from its source tree
        return None


def _cpu() -> str:
    """The model's name; platform.processor() is empty on many Linux systems."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return models[0] if models else platform.machine()
