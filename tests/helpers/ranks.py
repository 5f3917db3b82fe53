"""A script as several ranks, as a launcher would start it."""

import os
import socket
import subprocess
from pathlib import Path

from tests.helpers import warm


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_ranks(world: int, script: Path, *arguments: str | Path, timeout: float = 900) -> None:
    """Run `script` as `world` ranks that can meet; every one has to end with status 0."""
    assert end_ranks(world, script, *arguments, timeout=timeout) == [0] * world


def end_ranks(world: int, script: Path, *arguments: str | Path, timeout: float = 900) -> list[int]:
    """The same, with the status that each ends with."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        warm.popen(
            warm.script(script, *arguments),
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(world)
    ]
    try:
        return [rank.wait(timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
