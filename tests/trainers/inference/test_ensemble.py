"""Ensembles made on one split and reported on another, and what an evaluation writes."""

import errno
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.terminal import Terminal
from bigbatch.data.listing import Listing
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.ensemble.combination import Combination, Logits
from bigbatch.trainers.ensemble.evaluations import statistics_of
from bigbatch.trainers.ensemble.folder import Ensemble, open_ensemble, read_record, write_ensemble
from bigbatch.trainers.evaluation.metrics import softmax
from bigbatch.trainers.evaluation.outcomes import outcomes
from bigbatch.trainers.evaluation.words import in_words
from bigbatch.trainers.inference import __main__ as entry
from bigbatch.trainers.inference import ensemble as making
from bigbatch.trainers.inference.ensemble import FEATURES, METHODS, Plan, make
from bigbatch.trainers.inference.evaluate import open_labelled, save_evaluation, table_of
from bigbatch.trainers.recovery import signals
from bigbatch.trainers.recovery.signals import Stopped
from tests.helpers.runs import untrained_run

CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("ddp", "fp32")


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    return untrained_run(folder, digits, CLASSES, snapshots=3).path


@pytest.fixture(scope="module")
def members(run: Path) -> Ensemble:
    return open_ensemble([run])


def logits_of(listing: Listing) -> Logits:
    """Those of three members of different skill, as if they had been trained."""
    generator = np.random.default_rng(len(listing.index))
    labels = listing.index.label
    logits = generator.normal(size=(3, len(labels), 10)).astype(np.float32)
    for member, skill in enumerate((0.5, 3.0, 2.5)):
        logits[member, np.arange(len(labels)), labels] += skill
    return logits


def splits(digits: Path) -> tuple[Listing, Listing]:
    return (
        open_labelled(str(digits / "val"), CLASSES),
        open_labelled(str(digits / "test"), CLASSES),
    )


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[pytest.mark.slow] * (m == "boost")) for m in METHODS if m != FEATURES],
)
def test_each_method_makes_an_ensemble_that_its_folder_gives_back(
    members: Ensemble, digits: Path, tmp_path: Path, method: str
) -> None:
    val, test = splits(digits)
    made = make(members, Plan(method, coverage=0.9, folds=3), val, test, logits_of)
    assert made.reported is not None
    write_ensemble(tmp_path / "e", made.ensemble, made.record)
    again = open_ensemble([tmp_path / "e"])
    kept = [members.members.index(member) for member in made.ensemble.members]
    logits = logits_of(test)[kept]
    p = again.combination.apply(logits)
    assert np.array_equal(p, made.ensemble.combination.apply(logits))
    labels = test.index.label
    assert made.reported["accuracy"] == (p.argmax(axis=1) == labels).mean()
    assert made.reported["nll"] == pytest.approx(-np.log(p[np.arange(len(p)), labels]).mean())
    assert made.ensemble.combination.reject_below is not None
    record = read_record(tmp_path / "e")
    assert record["fitted_on"]["data_hash"] == val.index.hash
    assert record["candidates"] == [member.name for member in members.members]
    assert set(record["kept_in_folds"].values()) <= set(range(4))


def test_the_gate_leaves_out_who_is_far_from_the_best(members: Ensemble, digits: Path) -> None:
    val, test = splits(digits)
    made = make(members, Plan(margin=0.2, folds=4), val, test, logits_of)
    assert [member.name for member in made.ensemble.members] == ["a/cycle-02", "a/cycle-03"]
    assert made.record["kept_in_folds"] == {"a/cycle-01": 0, "a/cycle-02": 4, "a/cycle-03": 4}
    assert made.reported is not None
    against = made.reported["members"]["against_best"]
    assert (against["best"], against["chosen_on"]) == ("a/cycle-02", "other samples")


def test_a_test_sample_neither_fits_nor_is_reported_as_if_it_had_not(
    members: Ensemble, digits: Path
) -> None:
    val, test = splits(digits)
    with pytest.raises(UserError, match="the split 'test' would decide"):
        make(members, Plan(), test, None, logits_of)
    with pytest.raises(UserError, match=r"120 samples, such as .* are in 'val', which decided"):
        make(members, Plan(), val, val, logits_of)


def test_an_evaluation_is_written_as_strict_json_with_the_worst_mistakes(
    members: Ensemble, digits: Path, tmp_path: Path
) -> None:
    _, test = splits(digits)
    logits, labels = logits_of(test), test.index.label.astype(np.int64)
    statistics = statistics_of(members, logits, labels)
    p = np.mean([softmax(own) for own in logits], axis=0)
    assert statistics["accuracy"] == (p.argmax(axis=1) == labels).mean()
    each = statistics["members"]["each"]
    assert [m["accuracy"] for m in each] == [(own.argmax(1) == labels).mean() for own in logits]
    save_evaluation(tmp_path / "e", members, test, statistics, outcomes(p, labels))
    content = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert content["mistakes_drawn"] == (p.argmax(axis=1) != labels).sum()
    assert (tmp_path / "e" / "worst.png").read_bytes().startswith(b"\x89PNG")


def test_no_mistake_makes_no_picture(members: Ensemble, digits: Path, tmp_path: Path) -> None:
    _, test = splits(digits)
    labels = test.index.label.astype(np.int64)
    right = outcomes(np.eye(10)[labels], labels)
    save_evaluation(tmp_path, members, test, {}, right)
    assert not (tmp_path / "worst.png").exists()


def test_a_split_without_targets_or_with_other_classes_is_no_evaluation(
    digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"120 of 120 images have no target among the model's 3"):
        open_labelled(str(digits / "val"), ("cat", "dog", "owl"))
    with pytest.raises(UserError, match="of its classes are none of the model's"):
        open_labelled(str(digits / "val"), CLASSES[:9])


def test_from_the_command_to_the_folder(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e"
    arguments = ["--source", str(digits / "val"), "--out", str(out)]
    assert entry.main(["ensemble", str(run), *arguments, "--report", str(digits / "test")]) == 0
    said = capsys.readouterr().out
    assert "* out of fold" in said
    assert "ensemble minus a/cycle-0" in said
    arguments = ["--source", str(digits / "test"), "--out", str(tmp_path / "x")]
    assert entry.main(["evaluate", str(out), *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    record = read_record(out)
    assert result["accuracy"] == record["reported"]["accuracy"]
    assert result["nll"] == record["reported"]["nll"]
    assert json.loads((tmp_path / "x" / "evaluation.json").read_text())["data_hash"]


def test_the_report_of_a_run_that_has_one_is_written_anew(
    run: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, out = RunDir(run), RunDir(run).evaluations / "val"
    arguments = ["evaluate", str(run), "--members", "cycle-02", "--source", str(digits / "val")]
    assert entry.main([*arguments, "--out", str(out)]) == 0
    assert not shown.report.exists()
    shown.report.write_text("old")
    assert entry.main([*arguments, "--out", str(out.parent.parent / "elsewhere")]) == 0
    assert shown.report.read_text() == "old"
    assert entry.main([*arguments, "--out", str(out)]) == 0
    assert f"report   {shown.report}" in capsys.readouterr().out
    text = shown.report.read_text()
    assert f"120 images of {digits / 'val'}" in text
    assert text.count("data:image/png") == 1  # the worst mistakes
    shown.report.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--members", "cycle-09"], "has no member 'cycle-09'"),
        (["--tta", "flip"], "never seen mirrored"),
        (["--source", "nowhere"], "no source 'nowhere' here; name one with --data and --split"),
    ],
)
def test_what_cannot_be_is_one_message_and_status_2(
    run: Path, digits: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = ["evaluate", str(run), "--source", str(digits / "val"), *arguments]
    assert entry.main(given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_member_is_named_and_nothing_is_averaged(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    shutil.copytree(run, tmp_path / "b")
    weights = tmp_path / "b" / "snapshots" / "cycle-03" / "model.safetensors"
    whole = weights.read_bytes()
    middle = len(whole) // 2  # a weight, which stays finite
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    weights.write_bytes(whole[:-1] if damage == "cut" else flipped)
    for command in ("evaluate", "predict", "ensemble"):
        out = tmp_path / f"{command}.csv"
        given = [str(run), str(tmp_path / "b"), "--source", str(digits / "val"), "--out", str(out)]
        assert entry.main([command, *given]) == 2
        assert "member b/cycle-03" in capsys.readouterr().err
        assert not out.exists()


def test_features_are_of_one_member(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(run), "--source", str(digits / "val"), "--out", str(tmp_path / "p.csv")]
    assert entry.main(["predict", *given, "--features"]) == 2
    assert "there are 3; choose one with --members" in capsys.readouterr().err
    assert entry.main(["predict", *given, "--features", "--members", "cycle-02"]) == 0


def test_temperature_does_not_change_who_wins(members: Ensemble, digits: Path) -> None:
    _, test = splits(digits)
    logits, labels = logits_of(test), test.index.label.astype(np.int64)
    plain = statistics_of(members, logits, labels)
    warm = replace(members, combination=Combination(temperature=2.0))
    served = statistics_of(warm, logits, labels)
    assert served["accuracy"] == plain["accuracy"]
    assert served["before_temperature"]["nll"] == plain["nll"]
    assert served["members"]["each"] == plain["members"]["each"]


def test_a_new_evaluation_leaves_no_picture_of_an_older_one(
    members: Ensemble, digits: Path, tmp_path: Path
) -> None:
    _, test = splits(digits)
    labels = test.index.label.astype(np.int64)
    wrong, right = (outcomes(np.eye(10)[(labels + k) % 10], labels) for k in (1, 0))
    save_evaluation(tmp_path, members, test, {}, wrong)
    assert (tmp_path / "worst.png").exists()
    save_evaluation(tmp_path, members, test, {}, right)
    assert not (tmp_path / "worst.png").exists()


def test_names_in_a_table_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"accuracy": 0.5, "accuracy_interval": (0.4, 0.6), "nll": 1.0, "ece": 0.1}
    Terminal(width=200).print(table_of({"te[b]st": [("x[/]y", figures), ("z[red]", figures)]}))
    said = capsys.readouterr().out
    assert "x[/]y" in said
    assert "z[red]" in said
    assert "te[b]st" in said


def test_images_in_folders_go_with_the_checksum_of_their_bytes(tmp_path: Path) -> None:
    """val/cat/1.png and test/cat/1.png are two images, and a copy of one is the same."""
    for number, name in enumerate(("val/cat/1.png", "test/cat/1.png", "copy/cat/1.png")):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("L", (4, 4), number % 2 * 100).save(tmp_path / name)
    Image.new("L", (4, 4), 0).save(tmp_path / "copy/cat/1.png")
    val, test, copy = (
        making._keys(open_labelled(str(tmp_path / name), ("cat",)))
        for name in ("val", "test", "copy")
    )
    assert val == copy != test


def test_ranks_that_find_other_members_or_images_end_together() -> None:
    def rank(other: str | None, differing: float) -> Any:
        return SimpleNamespace(
            world=3,
            from_main=lambda digest: other or digest,
            sum_by_name=lambda parts: {k: v + differing for k, v in parts.items()},
        )

    entry.require_same(rank(None, 0), "members", ["a", "\udcff"], "start again")
    with pytest.raises(UserError, match="1 of 3 ranks find other members than rank 0; start aga"):
        entry.require_same(rank("another", 0), "members", ["a"], "start again")
    with pytest.raises(UserError, match="2 of 3 ranks find other members"):  # rank 0 itself
        entry.require_same(rank(None, 2), "members", ["a"], "start again")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), 2, "then repeat the command"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_what_ends_a_command_from_outside_keeps_its_status_without_a_traceback(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    said: str,
) -> None:
    def ends(*given: object) -> int:
        raise error

    monkeypatch.setitem(entry._COMMANDS, "evaluate", ends)
    monkeypatch.setattr(entry.os, "dup2", lambda *files: None)
    assert entry.main(["evaluate", str(run), "--source", "x"]) == status
    found = capsys.readouterr().err
    assert "bigbatch resume" not in found
    assert said in found


def test_a_signal_ends_a_command_with_its_own_status(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(*given: object) -> int:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setitem(entry._COMMANDS, "evaluate", ends)
    monkeypatch.setattr(signals, "catch", lambda *given: {})
    given = ["evaluate", str(run), "--source", "x"]
    assert signals.until_stopped(lambda: entry.main(given)) == 143
    assert "bigbatch resume" not in capsys.readouterr().err


def test_what_sets_the_ensemble_apart_from_its_members_is_said() -> None:
    answered = {"below": 0.9997, "coverage": 0.9, "accuracy": 0.995}
    nothing = {"members": None, "temperature": None, "rejection": None, "conformal": None}
    temperature, rejection = in_words({**nothing, "temperature": 0.5, "rejection": answered})
    assert "temperature 0.500, in the ensemble's nll and ece; members are without" in temperature
    assert "confidence below 0.9997 is rejected: 90.0% answered, 99.50% of them" in rejection
    assert "accuracy above is of all" in rejection
    assert in_words(nothing) == []
