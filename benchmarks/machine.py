"""What a benchmark's results say of where they come from."""

import os
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """Date, hardware, system and versions; of torch as well where it is one of the packages."""
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
    return found


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
