"""Evaluations that two runs have in common, and what `bigbatch diff` says of them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
from click.testing import CliRunner, Result

from bigbatch.configs.judged import ACCURACY, MAE, NLL
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.cli.main import cli
from bigbatch.trainers.evaluation.by_sample import (
    OUTCOMES,
    BySample,
    compare_by_sample,
    read_outcomes,
    write_outcomes,
)
from bigbatch.trainers.evaluation.outcomes import outcomes
from bigbatch.trainers.evaluation.pairs import in_words, pair_evaluations
from bigbatch.trainers.evaluation.record import (
    EVALUATION,
    SCORES,
    read_evaluation,
    write_evaluation,
)
from bigbatch.trainers.evaluation.statistics import summarise
from bigbatch.trainers.ledger.lines import DIGESTS, FIRST, chained
from bigbatch.trainers.ledger.plot import scores
from tests.helpers.predictions import predictions

N = 40
KEYS = [f"{i:04d}" for i in range(N)]
MEMBERS, LABELS = predictions(N, 3, members=2)


def evaluated(run: RunDir, name: str, member: int, **changes: Any) -> None:
    """As `bigbatch evaluate RUN --split NAME` leaves it."""
    p, keys = MEMBERS[member], changes.pop("keys", KEYS)
    labels = changes.pop("labels", LABELS)
    content = {
        "source": f"shards/digits/{name}", "data_hash": "aa11", "notes": [], "tta": "none",
        "combination": "mean", "mc_dropout": 0, "member_names": [f"{run.name}/cycle-01"],
    }  # fmt: skip
    content |= summarise(labels, p) | changes
    folder = run.evaluations / name
    content["outcomes_sha256"] = write_outcomes(folder, keys, "abc", outcomes(p, labels))
    write_evaluation(folder, content)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[RunDir, RunDir]:
    """Without a ledger, as those of older versions."""
    recipe = load_recipe("digits", ["data.path=shards/digits"])
    a, b = (create_run(tmp_path / name, recipe) for name in ("one", "other"))
    evaluated(a, "val", 0)
    evaluated(b, "val", 1)
    return a, b


def kept(run: RunDir) -> BySample:
    folder = run.evaluations / "val"
    return read_outcomes(folder, read_evaluation(folder)["outcomes_sha256"])


def diff(runs: tuple[RunDir, RunDir], *options: str) -> Result:
    found = CliRunner().invoke(cli, ["diff", *(str(run.path) for run in runs), *options])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


def problem(runs: tuple[RunDir, RunDir]) -> str:
    (found,) = pair_evaluations(*runs)
    (line,) = in_words([found])
    assert line == f"evaluation val: not compared: {found['problem']}"
    return str(found["problem"])


def test_diff_compares_what_both_have_though_their_ledgers_cannot_be(
    runs: tuple[RunDir, RunDir],
) -> None:
    shown = diff(runs, "--json")
    assert shown.exit_code == 2
    content = json.loads(shown.output)
    assert content["verdict"].startswith(f"not comparable: {runs[0].ledger} is not there")
    (found,) = content["evaluations"]
    wanted = compare_by_sample(kept(runs[0]), kept(runs[1]))
    assert {key: found[key] for key in wanted} == wanted
    assert (found["name"], found["problem"], found["notes"]) == ("val", None, [])
    assert found["data_hash"] == {"A": "aa11", "B": "aa11"}
    said = diff(runs)
    assert said.exit_code == 2
    accuracy, nll = wanted["accuracy"], wanted["nll"]
    low, high = accuracy["interval"]
    assert "evaluation val: B minus A over 40 samples, 95 % each:" in said.output
    assert (
        f"  accuracy {accuracy['A']:.2%} in A, {accuracy['B']:.2%} in B: "
        f"{100 * accuracy['difference']:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f})\n"
    ) in said.output
    assert (
        f"nll {nll['A']:.4f} in A, {nll['B']:.4f} in B: {nll['difference']:+.4f} (" in said.output
    )
    counts = wanted["mcnemar"]
    right = f"right in A alone: {counts['only_A']}, in B alone: {counts['only_B']}; McNemar's p = "
    assert right in said.output
    assert said.output.splitlines()[-1] == content["verdict"]


def test_the_exit_status_is_of_bits_alone(runs: tuple[RunDir, RunDir]) -> None:
    """One ledger in both: the same bits, whatever evaluations say."""
    step = chained(FIRST, 5, dict.fromkeys(DIGESTS, "0" * 16))
    for run in runs:
        run.ledger.write_text(json.dumps(step) + "\n")
    shown = diff(runs)
    assert shown.exit_code == 0
    assert "evaluation val: B minus A over 40 samples" in shown.output
    assert shown.output.splitlines()[-1] == "the same, bit for bit"


def test_samples_of_one_alone_are_counted_and_said(runs: tuple[RunDir, RunDir]) -> None:
    evaluated(runs[1], "val", 1, keys=[*KEYS[:30], *(f"new-{i}" for i in range(10))])
    found = pair_evaluations(*runs)
    assert found[0]["samples"] == {"both": 30, "A": 10, "B": 10}
    said = "  left out, since the other has no such key: 10 of A, 10 of B"
    assert said in in_words(found)


def test_other_data_are_not_compared_in_silence(runs: tuple[RunDir, RunDir]) -> None:
    for ours, theirs, said in (
        ("aa11", "bb22", "aa11 in A and bb22 in B"),
        ("aa11", "", "aa11 in A and unknown in B"),
        ("", "", "unknown in A and unknown in B"),
    ):
        evaluated(runs[0], "val", 0, data_hash=ours)
        evaluated(runs[1], "val", 1, data_hash=theirs)
        found = pair_evaluations(*runs)
        assert found[0]["notes"] == [
            f"not known to be the same images: data_hash is {said}; joined by key and target alone"
        ]
        assert f"  note: {found[0]['notes'][0]}" in in_words(found)
    evaluated(runs[1], "val", 1, data_hash="bb22", labels=(LABELS + 1) % 3)
    assert "40 of 40 keys stand for another target in A than in B, such as 0000: " in problem(runs)


def test_what_was_done_otherwise_is_noted(runs: tuple[RunDir, RunDir]) -> None:
    names = ["other/cycle-01", "other/cycle-02"]
    evaluated(runs[1], "val", 1, tta="five", member_names=names, notes=["chosen on it"])
    assert pair_evaluations(*runs)[0]["notes"] == [
        "tta: none in A, five in B",
        "members: cycle-01 in A, cycle-01, cycle-02 in B",
        "B: chosen on it",
    ]


def test_what_is_missing_is_a_line_with_the_command(runs: tuple[RunDir, RunDir]) -> None:
    a, b = runs
    evaluated(a, "test", 0)
    one, _ = pair_evaluations(*runs)
    assert one["problem"] == (
        f"B has no such evaluation; `bigbatch evaluate {b.path} --split test` makes one"
    )
    about = json.loads((a.evaluations / "test" / EVALUATION).read_text())
    about["source"] = "elsewhere/test"
    write_evaluation(a.evaluations / "test", about)
    one, _ = pair_evaluations(*runs)
    assert f"`bigbatch evaluate {b.path} --data elsewhere/test` makes one" in one["problem"]
    shutil.rmtree(a.evaluations / "test")
    (b.evaluations / "val" / OUTCOMES).unlink()
    assert problem(runs) == (
        f"of B: {b.evaluations / 'val' / OUTCOMES}: No such file or directory; "
        f"`bigbatch evaluate {b.path} --split val` writes them"
    )
    os.mkfifo(b.evaluations / "val" / OUTCOMES)  # whose reader would wait for ever
    assert f"of B: {b.evaluations / 'val' / OUTCOMES}: no file; `bigbatch" in problem(runs)
    about = json.loads((b.evaluations / "val" / EVALUATION).read_text())
    del about["outcomes_sha256"]  # of an older version
    write_evaluation(b.evaluations / "val", about | {"source": "elsewhere/photos/"})
    assert problem(runs) == (
        f"of B: no outcomes by sample were kept with it; `bigbatch evaluate {b.path} "
        f"--data elsewhere/photos/ --out {b.evaluations / 'val'}` writes them"
    )
    (b.evaluations / "val" / EVALUATION).write_text("{")
    assert "of B: Invalid JSON" in problem(runs)
    (b.evaluations / "val" / EVALUATION).rename(b.evaluations / "val" / SCORES)
    assert problem(runs) == "B learns numbers or shares, and these comparisons are of labels"
    for run in runs:
        shutil.rmtree(run.evaluations)
    assert in_words(pair_evaluations(*runs)) == ["evaluations: none of either run"]


def test_an_evaluation_without_outcomes_leaves_none_of_an_older_one(
    runs: tuple[RunDir, RunDir],
) -> None:
    folder = runs[0].evaluations / "val"
    about = json.loads((folder / EVALUATION).read_text())
    write_evaluation(folder, about)
    assert (folder / OUTCOMES).exists()
    write_evaluation(folder, about | {"outcomes_sha256": None})
    assert not (folder / OUTCOMES).exists()


def test_curves_of_both_lie_over_each_other(
    runs: tuple[RunDir, RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training loss, and accuracy and NLL of the validation split, each of both runs."""
    for number, run in enumerate(runs):
        records: list[dict[str, Any]] = [
            {"kind": "train", "step": step, "loss": 2.0 / step + number} for step in range(1, 5)
        ]
        for step, split in ((2, "val"), (4, "val"), (4, "test")):
            records.append({"kind": "eval", "step": step, "split": split, "nll": 1.0 / step,
                            "accuracy": 0.1 * step + number / 10})  # fmt: skip
        records.append({"kind": "eval", "step": 6, "split": "val", "nll": None, "accuracy": 0.5})
        run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert scores(runs) == {
        ACCURACY: [{2: 0.2, 4: 0.4, 6: 0.5}, {2: pytest.approx(0.3), 4: 0.5, 6: 0.5}],
        NLL: [{2: 0.5, 4: 0.25}] * 2,
    }
    seen: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda figure, path: seen.append(figure) or save(figure, path),
    )
    assert diff(runs, "--plot", str(tmp_path / "both.png")).exit_code == 2
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    panels = {axes.get_title("left"): axes for axes in seen[0].axes}
    assert list(panels) == [
        *("training loss", "validation accuracy", "|A - B|", "validation NLL"),
    ]
    lines = panels["validation accuracy"].get_lines()
    assert [line.get_label() for line in lines] == ["A one", "B other"]
    assert np.asarray(lines[1].get_xydata()).tolist() == [
        [2, pytest.approx(0.3)],
        [4, 0.5],
        [6, 0.5],
    ]
    for run in runs:
        text = run.metrics.read_text().splitlines()
        run.metrics.write_text("".join(f"{line}\n" for line in text if '"train"' in line))
    assert diff(runs, "--plot", str(tmp_path / "loss.png")).exit_code == 2
    assert [axes.get_title("left") for axes in seen[1].axes] == ["training loss", "|A - B|"]


def test_scores_of_different_kinds_are_laid_over_each_other_by_nobody(
    runs: tuple[RunDir, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in runs:
        run.metrics.write_text(
            '{"kind": "eval", "step": 2, "split": "val", "accuracy": 0.5, "nll": 1.0}\n'
        )
    assert scores(runs)
    judges = iter((ACCURACY, MAE))
    monkeypatch.setattr("bigbatch.trainers.ledger.plot.judged_by", lambda recipe: next(judges))
    assert scores(runs) == {}
