"""Bad samples from outside: a run with damaged shards, its summary, and `inspect --journal`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.index import Index, open_index
from bigbatch.data.journal import append, count, journal_file, kind, read_journal
from bigbatch.data.order import build_order
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.start import agent_command
from bigbatch.trainers.monitoring.history import read_history
from bigbatch.trainers.report.report import write_report
from tests.helpers import warm
from tests.helpers.micro_batches import damage

BAD = (3, 500, 501)  # samples of the training split


def inspect(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["inspect", *map(str, arguments)], catch_exceptions=False)
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def finished(shards: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Index]:
    """Two epochs on two ranks over damaged shards: the run, what it said, and the index."""
    here = tmp_path_factory.mktemp("damaged")
    shutil.copytree(Path(shards) / "shards", here / "shards")
    index = open_index(here / "shards/digits/train")
    damage(index, BAD)
    changes = ("duration=2 epochs", "data.sampling=uniform", "log.wandb=off", "ensemble.soup=false")
    changes += ("data.image_size=16",)
    command = warm.bigbatch("train", "digits", *changes, "schedule={name: cosine}", "--nproc", "2")
    done = warm.run(command, cwd=here, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return here / "runs/digits", done.stdout, index


def test_the_journal_names_each_sample_and_its_substitutes(
    finished: tuple[Path, str, Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, index = finished
    monkeypatch.chdir(run.parent.parent)  # where the recipe's data.path leads to the shards
    status, text = inspect("--journal", run, "--json")
    found = json.loads(text)
    assert status == 1
    assert found["samples"] == 3
    assert {row["sample"] for row in found["bad"]} == set(BAD)
    assert sum(found["shards"].values()) == 3
    assert found["reasons"] == {"the bytes differ from the index": 3}
    recipe, keys = RunDir(run).recipe(), index.keys()
    order = build_order(recipe.data.sampling, index, recipe.seed)
    steps = -(-2 * len(index) // 256)
    drawn = order.samples(np.arange(steps * 256))
    for row in found["bad"]:
        assert row["key"] == keys[row["sample"]]
        assert row["shard"] == index.shards[index.shard[row["sample"]]].name
        assert row["offset"] == index.offset[row["sample"]]
        assert row["steps"] == [p // 256 for p in np.flatnonzero(drawn == row["sample"]).tolist()]
        assert len(row["substitutes"]) == len(row["steps"])
        for other in row["substitutes"]:
            assert other["key"] == keys[other["sample"]]
            assert index.label[other["sample"]] == index.label[row["sample"]]
            assert other["sample"] not in BAD


def test_the_tables_say_the_same(
    finished: tuple[Path, str, Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, index = finished
    monkeypatch.chdir(run.parent.parent)
    status, text = inspect("--journal", "digits")
    assert status == 1
    for sample in BAD:
        assert index.keys()[sample] in text
        assert f"{int(index.offset[sample]):,}" in text
    assert "the bytes differ from the index" in text


def test_the_run_says_so_at_its_end(finished: tuple[Path, str, Index]) -> None:
    run, said, _ = finished
    assert "3 samples of" in said
    assert "inspect --journal" in said
    summary = json.loads((run / "summary.json").read_text())
    assert summary["bad_samples"] == count(read_journal(run))
    page = write_report(RunDir(run)).read_text()
    assert "Unreadable samples" in page
    assert read_history(RunDir(run)).bad_samples == summary["bad_samples"]


@pytest.mark.slow
def test_a_rank_says_what_it_alone_could_not_read(shards: str, tmp_path: Path) -> None:
    shutil.copytree(Path(shards) / "shards", tmp_path / "shards")
    recipe = load_recipe("digits", ["data.sampling=uniform", "data.bad_samples=0", "log.wandb=off"])
    index = open_index(tmp_path / "shards/digits/train")
    order = build_order(recipe.data.sampling, index, recipe.seed)
    of_rank_1 = int(order.samples(np.array([recipe.micro_batch]))[0])  # of step 0
    damage(index, [of_rank_1])
    run = create_run(tmp_path / "runs/alone", recipe)
    command = agent_command(run.path, 2)
    done = warm.run(command, cwd=tmp_path, capture_output=True, timeout=200)
    assert "bigbatch: rank 1: 1 samples could not be read" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"at byte {int(index.offset[of_rank_1]):,}" in done.stderr
    assert done.returncode == 2, done.stderr
    (entry,) = read_journal(run.path)
    assert (entry["step"], entry["sample"]) == (0, of_rank_1)


def test_without_the_shards_numbers_stand_for_keys(
    finished: tuple[Path, str, Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads(inspect("--journal", finished[0], "--json")[1])
    assert found["samples"] == 3
    assert {row["key"] for row in found["bad"]} == {None}
    assert "500" in inspect("--journal", finished[0])[1]


def test_a_run_without_bad_samples(tmp_path: Path, finished: tuple[Path, str, Index]) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(finished[0] / "recipe.yaml", tmp_path / "run")
    status, text = inspect("--journal", tmp_path / "run")
    assert (status, "could read every sample" in text) == (0, True)
    assert inspect("--journal", tmp_path / "run", "--json")[0] == 0


@pytest.mark.parametrize(
    "arguments", [[], ["x", "--journal", "y"], ["--journal", "y", "--verify"], ["--journal", "no"]]
)
def test_questions_that_make_no_sense(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"inspect SHARDS|no run 'no'"):
        inspect(*arguments)


def test_entries_are_counted_once_however_often_they_were_written(tmp_path: Path) -> None:
    def entry(step: int, sample: int, reason: str) -> dict[str, Any]:
        place = {"step": step, "position": 8 * step, "sample": sample, "shard": f"{sample % 2}.tar"}
        return {**place, "offset": 512, "reason": reason, "substitute": 9}

    first, again = entry(1, 4, "0 bytes"), entry(5, 4, "0 bytes")
    other = entry(3, 5, "not an image (it starts with b'x')")
    append(journal_file(tmp_path, 0), [again, first])
    append(journal_file(tmp_path, 1), [first, other])  # resumed with another number of ranks
    with journal_file(tmp_path, 1).open("a") as file:
        file.write('{"step": 4, "torn')
    found = read_journal(tmp_path)
    assert found == [first, other, again]
    assert count(found) == {
        "entries": 3,
        "samples": 2,
        "shards": {"0.tar": 1, "1.tar": 1},
        "reasons": {"N bytes": 1, "not an image": 1},
    }


def test_kinds_of_reasons() -> None:
    assert kind("the shard ends after 1,024 of 5,000 bytes") == "the shard ends after N of N bytes"
    assert kind("sample 'a/b7' has label 10 of 10 classes") == "sample ... has label N of N classes"
