"""Members of runs, found by name, and ensembles kept in a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.folder import (
    ENSEMBLE,
    Ensemble,
    open_ensemble,
    read_record,
    write_ensemble,
)
from bigbatch.trainers.ensemble.members import check_members, find_members
from bigbatch.trainers.recovery.tensor_files import save_weights
from tests.helpers.runs import untrained_run

CLASSES = tuple("0123456789")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return untrained_run(tmp_path / "runs" / "a", tmp_path, CLASSES, snapshots=3)


def names(run: RunDir, choice: str) -> list[str]:
    return [member.name for member in find_members(run, choice)]


def checkpoint(run: RunDir, step: int) -> None:
    folder = run.checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    weights = run.snapshots / "cycle-01" / "model.safetensors"
    shutil.copyfile(weights, folder / "model.safetensors")


def test_auto_takes_what_the_run_kept_and_before_its_end_all_snapshots(run: RunDir) -> None:
    assert names(run, "auto") == ["a/cycle-01", "a/cycle-02", "a/cycle-03"]
    run.ensemble.mkdir()
    (run.ensemble / "members.json").write_text('{"kept": ["cycle-01", "cycle-03"]}')
    assert names(run, "auto") == ["a/cycle-01", "a/cycle-03"]


def test_before_the_first_snapshot_the_newest_checkpoint_is_the_member(tmp_path: Path) -> None:
    run = untrained_run(tmp_path / "b", tmp_path, CLASSES, snapshots=1)
    for step in (5, 25):
        checkpoint(run, step)
    shutil.rmtree(run.snapshots)
    assert names(run, "auto") == ["b/step-00000025"]


def test_all_names_no_step_twice_and_a_list_is_taken_as_given(run: RunDir) -> None:
    for step in (20, 25):  # the second snapshot's step, and one of its own
        checkpoint(run, step)
    expected = ["a/cycle-01", "a/cycle-02", "a/cycle-03", "a/step-00000025"]
    assert names(run, "all") == expected
    run.ensemble.mkdir()
    shutil.copyfile(
        run.snapshots / "cycle-02" / "model.safetensors", run.ensemble / "soup.safetensors"
    )
    assert names(run, "soup, cycle-03") == ["a/soup", "a/cycle-03"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [("cycle-07", "no member 'cycle-07'; it has cycle-01, cycle-02, cycle-03"),
     ("cycle-01,cycle-01", "names one member twice")],
)  # fmt: skip
def test_members_that_are_not_there_are_named(run: RunDir, choice: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_members(run, choice)


def test_a_member_holds_the_weights_of_its_file_and_is_in_eval_mode(run: RunDir) -> None:
    member = find_members(run)[1]
    model = member.build()
    assert not any(module.training for module in model.modules())
    there = load_file(run.snapshots / "cycle-02" / "model.safetensors")
    assert all(torch.equal(value, there[name]) for name, value in model.state_dict().items())


def test_weights_to_start_from_need_not_be_there_any_more(tmp_path: Path) -> None:
    run = untrained_run(tmp_path / "a", tmp_path, CLASSES, snapshots=1)
    recipe = run.recipe_file.read_text()
    run.recipe_file.write_text(recipe.replace("checkpoint: null", "checkpoint: /gone.pt"))
    find_members(run)[0].build()


def test_damage_names_the_member(run: RunDir) -> None:
    path = run.snapshots / "cycle-02" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"member a/cycle-02: .*cannot be read"):
        find_members(run)
    path.unlink()
    with pytest.raises(UserError, match="member a/cycle-02"):
        find_members(run)


def test_a_recipe_that_is_not_that_of_the_weights_is_refused(run: RunDir) -> None:
    text = run.recipe_file.read_text()
    assert "image_size: 32" in text
    run.recipe_file.write_text(text.replace("image_size: 32", "image_size: 24"))
    with pytest.raises(UserError, match="trained with another image_size than its recipe"):
        find_members(run)


def test_members_must_share_classes_in_order_and_channels(tmp_path: Path) -> None:
    first = find_members(untrained_run(tmp_path / "a", tmp_path, CLASSES, snapshots=1))
    other = find_members(untrained_run(tmp_path / "b", tmp_path, CLASSES[::-1], snapshots=1))
    more = find_members(untrained_run(tmp_path / "c", tmp_path, (*CLASSES, "x"), snapshots=1))
    rgb = ["data.channels=3", "augment.mean=[0,0,0]", "augment.std=[1,1,1]"]
    colour = find_members(untrained_run(tmp_path / "d", tmp_path, CLASSES, rgb, snapshots=1))
    with pytest.raises(UserError, match=r"b/cycle-01 has the classes of a/cycle-01 in another ord"):
        check_members([*first, *other])
    with pytest.raises(UserError, match=r"c/cycle-01 has other classes than a/cycle-01 \(11 and"):
        check_members([*first, *more])
    with pytest.raises(UserError, match="d/cycle-01 sees 3 channels, a/cycle-01 1"):
        check_members([*first, *colour])


def test_runs_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    runs = [untrained_run(tmp_path / f / "a", tmp_path, CLASSES, snapshots=1) for f in "xy"]
    ensemble = open_ensemble([run.path for run in runs])
    assert [m.name for m in ensemble.members] == ["a/cycle-01#1", "a/cycle-01#2"]
    with pytest.raises(UserError, match="given twice"):
        open_ensemble([runs[0].path, runs[0].path])


def test_a_folder_gives_back_what_was_written(run: RunDir, tmp_path: Path) -> None:
    members = tuple(find_members(run))
    written = Ensemble(members, Combination("weights", weights=(0.5, 0.25, 0.25), temperature=1.5))
    write_ensemble(tmp_path / "e", written, {"data": "abc"})
    shutil.rmtree(run.path)
    read = open_ensemble([tmp_path / "e"])
    assert read.combination == written.combination
    assert read.classes == CLASSES
    assert read_record(tmp_path / "e") == {"data": "abc"}
    assert [m.name for m in read.members] == [m.name for m in members]
    assert [m.recipe for m in read.members] == [m.recipe for m in members]
    with pytest.raises(UserError, match="exists already"):
        write_ensemble(tmp_path / "e", written)


def test_a_damaged_folder_is_one_message(run: RunDir, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    write_ensemble(folder, Ensemble(tuple(find_members(run)), Combination()))
    text = (folder / ENSEMBLE).read_text()
    content = json.loads(text)
    cases: list[tuple[object, str]] = [
        (None, "is damaged"),
        ({**content, "format": 2}, "has format 2"),
        ({**content, "members": []}, "lists no members"),
        ({**content, "members": [{"file": "../../x", "name": "x"}]}, "entry 0"),
        ({**content, "combination": {}}, "combination"),
        ({**content, "classes": ["0"]}, "another classes"),
    ]
    for damage, message in cases:
        (folder / ENSEMBLE).write_text(json.dumps(damage))
        with pytest.raises(UserError, match=message):
            open_ensemble([folder])
    (folder / ENSEMBLE).write_text(text)
    weights = folder / "members" / "01.safetensors"
    model = find_members(run)[1].build()
    save_weights(model, weights)  # whole, but of no known classes: taken for what the folder says
    open_ensemble([folder])
    weights.write_bytes(b"")
    with pytest.raises(UserError, match="member a/cycle-02 of"):
        open_ensemble([folder])


def test_a_link_to_a_run_is_that_run(run: RunDir, tmp_path: Path) -> None:
    link = tmp_path / "other"
    link.symlink_to(run.path)
    with pytest.raises(UserError, match="is given twice; give each run once"):
        open_ensemble([run.path, link])


def test_weights_without_classes_take_those_of_the_data_and_say_so_where_it_is_gone(
    digits: Path, tmp_path: Path
) -> None:
    """As 0.1.0 wrote them."""
    for name, data in (("here", digits), ("gone", tmp_path / "moved")):
        run = untrained_run(tmp_path / name, data, CLASSES, snapshots=1)
        weights = run.snapshots / "cycle-01" / "model.safetensors"
        save_weights(find_members(run)[0].build(), weights)
        if name == "here":
            assert find_members(run)[0].classes == CLASSES
            continue
        with pytest.raises(UserError, match="member gone/cycle-01: its weights do not name its cl"):
            find_members(run)


def test_a_run_named_by_a_dot_has_its_folder_s_name(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.path)
    assert find_members(RunDir(Path()))[0].name == f"{run.path.name}/cycle-01"
