"""Decoding that begins before torch is imported: the same figures, and never those of others."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.data import begun as begun_module
from bigbatch.data import loader
from bigbatch.data.batch import Decoding
from bigbatch.data.begun import Begun
from bigbatch.data.decode_batch import Decoded, Source
from bigbatch.data.geometry import View
from bigbatch.data.index import Index, open_index
from bigbatch.data.loader import eval_batches
from bigbatch.data.workers import WorkerPool
from bigbatch.trainers.engine import open_engine
from bigbatch.trainers.ensemble.folder import open_ensemble
from bigbatch.trainers.inference import ahead
from bigbatch.trainers.inference.__main__ import main
from bigbatch.trainers.inference.forward import Forward
from tests.helpers.runs import untrained_run

CLASSES = tuple("0123456789")


class Pool(WorkerPool):
    """Counts the batches that it is given, and those that it gives back."""

    submitted = received = 0

    def submit(self, *task: Any) -> None:
        Pool.submitted += 1
        super().submit(*task)

    def receive(self) -> Decoded:
        Pool.received += 1
        return super().receive()


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> type[Pool]:
    monkeypatch.setattr(ahead, "begun", None)
    monkeypatch.setattr(ahead, "_FROM", 20)
    monkeypatch.setattr(begun_module, "WorkerPool", Pool)
    monkeypatch.setattr(begun_module, "_MEMORY", 0)  # what one worker has in hand at least
    Pool.submitted = Pool.received = 0
    return Pool


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    path = tmp_path_factory.mktemp("runs") / "a"
    return untrained_run(path, digits, CLASSES, ["data.workers=1", "evaluate.batch=16"], 1)


@pytest.mark.parametrize(
    ("options", "batch"), [([], 16), (["--batch", "7"], 7), (["--tta", "five"], 16)]
)
def test_figures_are_those_of_the_command_alone(
    run: RunDir, digits: Path, options: list[str], batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(run.path), "--source", str(digits / "val"), "--json", *options]
    assert main(command) == 0
    alone = json.loads(capsys.readouterr().out)
    ahead.begin(command)
    assert Pool.submitted == 3
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    del alone["cost"], found["cost"]
    assert found == alone
    batches = -(-len(open_index(digits / "val")) // batch)
    assert (Pool.submitted, Pool.received) == (batches, batches)


def test_other_batches_than_it_was_given_are_decoded_anew(run: RunDir, digits: Path) -> None:
    index = open_index(digits / "val")
    begun = Begun(index, source_of(index), 1, batch=5, rank=0, world=1)
    assert same(index, begun, batch=16)
    assert Pool.submitted == 3 + -(-len(index) // 16)


def test_it_is_for_one_of_those_who_ask_and_for_the_same_images(digits: Path) -> None:
    index = open_index(digits / "val")
    begun = Begun(index, source_of(index), 1, batch=16, rank=1, world=2)
    assert same(index, begun, size=12)
    assert Pool.received == 0
    assert same(index, begun, rank=1, world=2)
    received = Pool.received
    assert same(index, begun, rank=1, world=2)
    assert received == Pool.received > 0
    begun.close()


def test_many_small_batches_leave_files_to_open(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(begun_module, "_MEMORY", 256 * 2**20)
    index = open_index(digits / "val")
    before = len(os.listdir("/proc/self/fd"))
    begun = Begun(index, source_of(index), 1, batch=1, rank=0, world=1)
    assert len(os.listdir("/proc/self/fd")) - before < 150
    assert same(index, begun, batch=1)


def test_another_index_is_small_or_large_by_itself(
    run: RunDir, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers would have been started for a handful of images, as those of the first were."""
    monkeypatch.setattr(loader, "WorkerPool", None)
    ahead.begin(["evaluate", str(run.path), "--source", str(digits / "val")])
    members = open_ensemble([run.path]).members
    forward = Forward(open_engine("ddp", "fp32"), members, begun=ahead.begun)
    for split in ("val", "test"):
        index = open_index(digits / split)
        assert sum(len(outputs.samples) for outputs in forward.outputs(index)) == len(index)
    assert Pool.received == -(-len(open_index(digits / "val")) // 16)


def test_an_index_that_changes_meanwhile_is_said(digits: Path) -> None:
    index = open_index(digits / "val")
    begun = Begun(index, source_of(index), 1, batch=16, rank=0, world=1)
    changed = replace(index, size=index.size + (np.arange(len(index), dtype=np.uint32) == 40))
    batches = eval_batches(changed, decoding(), batch=16, rank=0, world=1, begun=begun)
    with pytest.raises(UserError, match="val has changed while it was read; start again"):
        list(batches)


@pytest.mark.parametrize(
    "changes",
    [
        {"command": "features"},
        {"source": "nowhere"},
        {"source": "val/000000.tar"},
        {"model": "no-run"},
        {"few": True},
        {"command": "ensemble", "options": ["--soup", "greedy"]},
    ],
)
def test_what_gains_nothing_or_is_wrong_is_left_to_the_command(
    run: RunDir, digits: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "few" in changes:
        monkeypatch.setattr(ahead, "_FROM", 2000)
    model = changes.get("model", str(run.path))
    source = digits / changes.get("source", "val")
    options = ["--source", str(source), *changes.get("options", [])]
    ahead.begin([changes.get("command", "evaluate"), model, *options])
    assert ahead.begun is None
    assert Pool.submitted == 0


def decoding(size: int = 16) -> Decoding:
    return Decoding(size, 3, workers=0, threads=1, view=View(size, 1.0))


def source_of(index: Index) -> Source:
    names = [file.name for file in index.shards]
    return Source(index.root, names, image_size=16, channels=3, threads=1, view=View(16, 1.0))


def same(
    index: Index, begun: Begun, *, batch: int = 16, rank: int = 0, world: int = 1, size: int = 16
) -> bool:
    """Whether batches are those that are decoded without it."""
    place = {"batch": batch, "rank": rank, "world": world}
    alone = list(eval_batches(index, decoding(size), **place))
    found = list(eval_batches(index, decoding(size), **place, begun=begun))
    return len(found) == len(alone) > 0 and all(
        np.array_equal(a.samples, b.samples) and np.array_equal(a.pixels, b.pixels)
        for a, b in zip(found, alone, strict=True)
    )
