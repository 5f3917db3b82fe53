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
from bigbatch.trainers.engine.host_memory import keep_freed_memory
keep_freed_memory()
def step():
    return sum(len(t) for t in [torch.ones(n << 18) for n in (4, 8, 16, 24, 24, 24)])
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(json.dumps([after - before, "THP_MEM_ALLOC_ENABLE" in os.environ]))
"""


def faults(**variables: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _STEPS],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    count, is_said = json.loads(done.stdout)
    assert not is_said  # what this process was started with stays what it was
    return int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_what_a_step_frees_is_there_for_the_next_unless_the_user_says_how() -> None:
    assert faults() < 100
    assert faults(MALLOC_MMAP_THRESHOLD_="65536") > 10_000  # 100 MiB are 25,600 pages
