"""The largest micro-batch, on real runs whose memory is limited."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.launcher.child import Children, RunFailed, kill_tree
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.search import find_micro_batch as work
from bigbatch.launcher.search.find_micro_batch import Probe, find, probe_recipe, sizes
from bigbatch.trainers.recovery.oom import OUT_OF_MEMORY, is_out_of_memory


def test_sizes_divide_the_batch_and_leave_work_for_every_rank() -> None:
    plain = ["augment.mixup=0", "global_batch=96"]
    recipe = load_recipe("digits", [*plain, "micro_batch=96"])
    assert sizes(recipe, 1) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96]
    assert sizes(recipe, 4) == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    lanes = load_recipe(
        "digits", [*plain, "micro_batch=24", "data.lanes=4", "data.sampling=uniform"]
    )
    assert sizes(lanes, 1) == [1, 2, 3, 4, 6, 8, 12, 24]
    mixed = load_recipe("digits", ["global_batch=96", "micro_batch=96"])
    assert sizes(mixed, 4) == [2, 3, 4, 6, 8, 12, 16, 24]  # one image has none to mix with
    with pytest.raises(UserError, match="97 ranks"):
        sizes(recipe, 97)


def test_where_the_batch_changes_every_step_is_divided() -> None:
    growing = "global_batch={name: stages, pieces: [{batch: 16, until: 1 epochs}, {batch: 64}]}"
    recipe = load_recipe("digits", [growing, "micro_batch=8", "augment.mixup=0"])
    assert sizes(recipe, 1) == [1, 2, 4, 8, 16]
    assert sizes(recipe, 4) == [1, 2, 4, 8, 16]  # of 16 three ranks wait in small steps
    sharded = ["backend=zero1", "reduction=overlapped"]
    recipe = load_recipe("digits", [growing, "micro_batch=8", "augment.mixup=0", *sharded])
    assert sizes(recipe, 4) == [1, 2, 4]  # here none may: `check_world` would refuse the run


def test_a_probe_is_the_recipe_with_one_or_two_micro_batches_on_each_rank() -> None:
    recipe = load_recipe("digits")
    assert probe_recipe(recipe, 32, 2).global_batch == 128
    assert probe_recipe(recipe, 128, 2).global_batch == 256
    assert probe_recipe(recipe, 256, 1).micro_batches == 1
    assert probe_recipe(recipe, 32, 2).model == recipe.model


@pytest.mark.parametrize("largest", [1, 7, 8, 64, 200, 256])
def test_bisection_finds_the_largest(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    recipe = load_recipe("digits", ["augment.mixup=0"])

    def probe(recipe, size, world, folder, limit, children):
        return Probe(size, size <= largest, None, size)

    monkeypatch.setattr(work, "probe", probe)
    tried = find(recipe, 1, Path(), 0)
    assert max(p.micro_batch for p in tried if p.fits) == 2 ** (largest.bit_length() - 1)
    assert len(tried) <= 4  # of nine sizes


def test_what_running_out_of_memory_looks_like() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_memory_of_a_process_tree_and_what_is_free() -> None:
    code = "import time; block = b'x' * 100_000_000; print(len(block), flush=True); time.sleep(60)"
    parent = [
        sys.executable,
        "-c",
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])",
    ]
    with subprocess.Popen(parent, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 100e6 < work.tree_memory(process.pid) < 250e6
        kill_tree(process.pid)
    assert work.tree_memory(process.pid) == 0
    assert 0 < work.free_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


BIG = [
    "data.image_size=64",
    "data.workers=0",
    "global_batch=1024",
    "micro_batch=64",
    "log.wandb=off",
]


@pytest.mark.slow
def test_a_limit_on_memory_is_kept_by_real_runs(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit lies half-way between what the smallest and the largest size take."""
    monkeypatch.chdir(shards)
    recipe = load_recipe("digits", BIG)
    with Children(1) as children:
        ends = [work.probe(recipe, size, 1, tmp_path, 10**12, children) for size in (2, 1024)]
    assert all(p.fits for p in ends)
    limit = (ends[0].peak_bytes + ends[1].peak_bytes) / 2
    command = [sys.executable, "-P", "-m", "bigbatch.launcher.cli", "find-micro-batch", "digits"]
    command += [*BIG, "--nproc", "1", "--json", "--memory", str(limit / 1e9)]
    done = subprocess.run(command, cwd=shards, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["overrides"] == [f"micro_batch={found['micro_batch']}"]
    fits = {p["micro_batch"]: p["fits"] for p in found["probes"]}
    assert fits[found["micro_batch"]]
    assert found["micro_batch"] < min(size for size, fit in fits.items() if not fit)
    assert all(p["peak_bytes"] <= limit for p in found["probes"] if p["fits"])


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--memory", "0"], "--memory 0"), (["--nproc", "1000"], "1000 ranks")],
)
def test_mistakes(shards: str, options, says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards)
    with pytest.raises(UserError, match=says):
        CliRunner().invoke(cli, ["find-micro-batch", "digits", *options], catch_exceptions=False)


@pytest.mark.slow
def test_another_failure_is_not_taken_for_memory(shards: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(shards)
    recipe = load_recipe("digits", ["model.name=no_such_model", *BIG])
    with pytest.raises(RunFailed, match="no_such_model") as caught, Children(1) as children:
        work.probe(recipe, 16, 1, tmp_path, 10**12, children)
    assert OUT_OF_MEMORY not in str(caught.value)
