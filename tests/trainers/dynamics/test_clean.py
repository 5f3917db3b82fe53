"""Training samples on clean views, by the weights that a run kept: against brute force."""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import change_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.index import open_index
from bigbatch.data.order import read_weights
from bigbatch.launcher.cli.main import cli
from bigbatch.trainers.dynamics.clean import kept_weights, look_clean
from bigbatch.trainers.dynamics.files import TABLE
from bigbatch.trainers.engine import open_engine
from bigbatch.trainers.ensemble.members import find_members
from bigbatch.trainers.inference import __main__ as inference
from bigbatch.trainers.inference.clean import clean_rows
from bigbatch.trainers.inference.forward import Forward
from tests.helpers.runs import untrained_run

CLASSES = tuple("0123456789")
MIXED = ("augment.mixup=0.8", "data.train=val", "evaluate.batch=50", "data.image_size=16")
STEPS = [10, 20, 30]


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Three snapshots, and a recipe that mixes; of a small split, so that little is computed."""
    return untrained_run(tmp_path_factory.mktemp("runs") / "mixed", digits, CLASSES, MIXED, 3)


def by_hand(run: RunDir, digits: Path) -> list[dict[str, float]]:
    """Figures of each sample by their definitions, in float64, from the members' own logits."""
    index = open_index(digits / "val")
    engine = open_engine("ddp", "fp32")
    logits = [Forward(engine, [member]).logits(index) for member in find_members(run, "all")]
    found = []
    for i, label in enumerate(index.label.tolist()):
        losses, margins, p_true = [], [], []
        for own in logits:
            assert own is not None
            z = own[0, i].astype(np.float64)
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            losses.append(-np.log(p[label]))
            margins.append(z[label] - np.delete(z, label).max())
            p_true.append(p[label])
        right = [m > 0 for m in margins]
        found.append(
            {
                "margin": float(np.mean(margins)),
                "confidence": float(np.mean(p_true)),
                "variability": float(np.std(p_true)),
                "loss": float(np.mean(losses)),
                "right": float(np.mean(right)),
                "forgotten": sum(a and not b for a, b in pairwise(right)),
                "learned": right.index(True) + 1 if True in right else 0,
            }
        )
    return found


def call(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> str:
    """The command, whose one rank runs in this process."""

    def here(module: str, arguments: list[str], peers: Any, nproc: Any) -> None:
        assert module == "bigbatch.trainers.inference"
        sys.exit(inference.main(arguments))

    monkeypatch.setattr("bigbatch.launcher.ranks.run_ranks", here)
    with pytest.raises(SystemExit) as ended:
        cli.main(["samples", str(run.path), "--clean", *more], standalone_mode=False)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_figures_are_those_of_each_members_own_logits(
    run: RunDir,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("bigbatch.trainers.dynamics.files.draw_map", lambda found, path: None)
    out, weights = tmp_path / "out", tmp_path / "weights.parquet"
    said = call(
        run, monkeypatch, capsys, "--out", str(out), "--weights", str(weights),
        "--drop", "0.1", "--json", "--top", "5",
    )  # fmt: skip
    result, wanted = json.loads(said), by_hand(run, digits)
    index = open_index(digits / "val")
    assert (result["clean"], result["steps"], result["samples"]) == (STEPS, 30, len(index))
    assert not any("mixed each image" in note for note in result["notes"])
    table = pq.read_table(out / TABLE).to_pydict()
    assert table["key"] == index.keys()
    assert table["visits"] == [3] * len(index)
    for name in wanted[0]:
        assert table[name] == pytest.approx([w[name] for w in wanted], rel=2e-3, abs=2e-3), name
    order = sorted(range(len(index)), key=lambda i: (table["margin"][i], i))
    assert [row["key"] for row in result["label_errors"]] == [table["key"][i] for i in order[:5]]
    dropped = np.flatnonzero(read_weights(weights, index) == 0).tolist()
    assert dropped == sorted(order[: round(0.1 * len(index))])
    plain = call(run, monkeypatch, capsys, "--until", "20", "--top", "0")
    count = len(index)
    assert f"clean views of {count} of {count} samples, by the weights after step 10, 20\n" in plain
    assert "note: 2 of the run's weights are few" in plain


def test_ranks_share_the_samples(run: RunDir, digits: Path) -> None:
    """Two ranks, each with its batches, one after the other in this process; the last is short."""
    index, members = open_index(digits / "val"), find_members(run, "all")
    engine = open_engine("ddp", "fp32")
    alone = clean_rows(Forward(engine, members, batch=32), index)
    assert alone is not None
    assert len(index) % 32
    parts: list[Any] = []
    for rank in (1, 0):

        def gather(rows: Any, capacity: int, rank: int = rank) -> Any:
            parts.insert(0, rows.numpy())
            return parts if rank == 0 else None

        one = SimpleNamespace(rank=rank, world=2, device=engine.device, gather_rows=gather)
        together = clean_rows(Forward(one, members, batch=32), index)  # type: ignore[arg-type]
    assert together is not None
    assert len(parts) == 2
    assert together.tobytes() == alone.tobytes()


def test_an_unreadable_sample_is_zeros_in_its_place(
    run: RunDir, digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits / "val", tmp_path / "val")
    index, bad = open_index(tmp_path / "val"), 53
    with (tmp_path / "val" / index.shards[0].name).open("r+b") as file:
        file.seek(int(index.offset[bad]))
        file.write(b"no picture at all")
    members = find_members(run, "cycle-01,cycle-03")
    engine = open_engine("ddp", "fp32")
    rows = clean_rows(Forward(engine, members, batch=50), index)
    whole = clean_rows(Forward(engine, members, batch=50), open_index(digits / "val"))
    assert rows is not None
    assert whole is not None
    empty = np.flatnonzero((rows.view(np.uint16) == 0).all(1))
    assert empty.tolist() == [bad, len(index) + bad]
    np.testing.assert_allclose(
        np.delete(rows, empty, 0).astype(float), np.delete(whole, empty, 0).astype(float), rtol=2e-3
    )


def test_weights_are_taken_by_step(run: RunDir, tmp_path: Path) -> None:
    """A checkpoint of a snapshot's step is its twin."""
    for step in (5, 20, 25):
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    try:
        assert list(kept_weights(run).items()) == [
            *((5, "step-00000005"), (10, "cycle-01"), (20, "cycle-02")),
            *((25, "step-00000025"), (30, "cycle-03")),
        ]
        assert list(kept_weights(run, 20)) == [5, 10, 20]
        with pytest.raises(UserError, match="no weights up to step 4: it has those after steps 5,"):
            kept_weights(run, 4)
    finally:
        for path in run.checkpoints.iterdir():
            path.rmdir()
    empty = create_run(tmp_path / "empty", run.recipe())
    with pytest.raises(UserError, match="holds no weights yet"):
        kept_weights(empty)
    (empty.snapshots / "cycle-01").mkdir(parents=True)
    with pytest.raises(UserError, match="does not say its step"):
        kept_weights(empty)


def test_samples_that_could_not_be_read_are_told_of(run: RunDir, digits: Path) -> None:
    count = len(open_index(digits / "val"))
    rows = np.ones((3 * count, 3), np.float16)
    rows[[7, count + 7, 2 * count + 7]] = 0
    looked = look_clean(run, rows, STEPS)
    assert np.flatnonzero(~looked.found.seen).tolist() == [7]
    assert looked.notes == ("1 samples could not be read, or have no finite value",)
    with pytest.raises(UserError, match="could be read"):
        look_clean(run, np.zeros((3 * count, 3), np.float16), STEPS)


def refused(run: RunDir, *options: str) -> Result:
    return CliRunner().invoke(cli, ["samples", str(run.path), *options])


def test_what_cannot_be_is_one_message(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "are of --clean" in str(refused(run, "--nproc", "2").exception)
    assert "no record of its samples" in str(refused(run).exception)
    moved = create_run(
        tmp_path / "moved", change_recipe(run.recipe(), [f"data.path={tmp_path / 'gone'}"])
    )
    assert isinstance(refused(moved, "--clean").exception, UserError)
    recipe = run.recipe()
    stream = recipe.model_copy(update={"data": recipe.data.model_copy(update={"stream": ("a",)})})
    monkeypatch.setattr("bigbatch.trainers.dynamics.clean.recipe_of", lambda run: stream)
    with pytest.raises(UserError, match=r"trained on data\.stream"):
        kept_weights(run)
