"""Freed memory that is kept: no page is faulted in a second time."""

import json
import os
import subprocess
import sys

import pytest

# Tensors of 4 to 24 MiB, freed all together, again and again, as a step's activations are.
_STEPS = """
import json, os, resource
import torch
from bigbatch.trainers.engine import open_engine
open_engine("ddp", "fp32")
def step():
    return sum(len(t) for t in [torch.ones(n << 18) for n in (4, 8, 16, 24, 24, 24)])
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
aligned = torch.ones(1 << 20).data_ptr() % 4096 == 0  # as torch asks for huge pages
print(json.dumps([after - before, aligned, "THP_MEM_ALLOC_ENABLE" in os.environ]))
"""


def faults(**variables: str) -> tuple[int, bool]:
    """Of ten steps on an engine's CPU; and whether tensors lie as huge pages want it."""
    done = subprocess.run(
        [sys.executable, "-c", _STEPS],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    count, aligned, is_said = json.loads(done.stdout)
    assert is_said == ("THP_MEM_ALLOC_ENABLE" in variables)  # it stays what it was started with
    return int(count), bool(aligned)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_what_a_step_frees_is_there_for_the_next_unless_the_user_says_how() -> None:
    count, aligned = faults()
    assert count < 100
    assert aligned
    count, aligned = faults(MALLOC_MMAP_THRESHOLD_="65536", THP_MEM_ALLOC_ENABLE="0")
    assert count > 10_000  # 100 MiB are 25,600 pages
    assert not aligned
