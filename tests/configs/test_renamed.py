"""Old names of keys: files, commands, runs, checkpoints and searches that have them work on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bigbatch.configs.errors import UserError
from bigbatch.configs.identity import differences, recipe_hash
from bigbatch.configs.load import dump_recipe, load_recipe, parse_recipe
from bigbatch.configs.notices import notice
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.configs.schema import Recipe
from bigbatch.configs.space import load_space

OLD = ("ensemble.gate=1", "recovery.step_over=3", "recovery.max_rollbacks=1")
NEW = ("ensemble.selection_margin=1", "recovery.skip_steps=3", "recovery.max_rollbacks=1")
SAID = [
    "ensemble.gate is now called ensemble.selection_margin; write that",
    "recovery.step_over is now called recovery.skip_steps; write that",
]


def old_names(text: str) -> str:
    return text.replace("selection_margin", "gate").replace("skip_steps", "step_over")


def test_commands_and_files_may_say_either(tmp_path: Path) -> None:
    new = load_recipe("digits", NEW)
    assert (new.ensemble.selection_margin, new.recovery.skip_steps) == (1, 3)
    said: list[str] = []
    assert load_recipe("digits", OLD, said.append) == new
    assert said == SAID
    (tmp_path / "mine.yaml").write_text(
        "base: digits\nensemble: {gate: 1}\nrecovery: {step_over: 3, max_rollbacks: 1}\n"
    )
    said.clear()
    mine = load_recipe(tmp_path / "mine.yaml", ["recovery.skip_steps=4"], said.append)
    assert sorted(said) == SAID
    assert (mine.ensemble.selection_margin, mine.recovery.skip_steps) == (1, 4)
    assert load_recipe(tmp_path / "mine.yaml", ["recovery={step_over: 5}"]).recovery.skip_steps == 5
    said.clear()
    load_recipe("digits", NEW, said.append)
    assert said == []


def test_both_names_at_once_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: digits\nensemble: {gate: 1, selection_margin: 1}\n")
    with pytest.raises(UserError, match=r"ensemble\.gate is the old name .* remove ensemble\.gate"):
        load_recipe(tmp_path / "mine.yaml")


def test_a_stored_run_and_its_checkpoints_are_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notice.cache_clear()
    recipe = load_recipe("digits", NEW)
    run = create_run(tmp_path / "run", recipe)
    run.recipe_file.write_text(old_names(dump_recipe(recipe)))
    stored = RunDir(run.path).recipe()
    assert stored == recipe
    assert differences(stored, recipe) == []
    # A checkpoint's fingerprint is a tree.
    tree = json.loads(old_names(json.dumps(recipe.model_dump(mode="json"))))
    assert differences(parse_recipe(tree, "stored"), recipe) == []
    assert capsys.readouterr().err == ""  # nobody wrote those names by hand


def test_hashes_are_those_of_commit_32e6f1a() -> None:
    assert recipe_hash(load_recipe("digits", OLD)) == "c293dec79e68b876"
    assert recipe_hash(load_recipe("digits", NEW)) == "c293dec79e68b876"


def test_a_search_may_say_either_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notice.cache_clear()
    path = tmp_path / "space.yaml"
    parameter = {"type": "float", "low": 0.01, "high": 0.1}
    path.write_text(yaml.safe_dump({"parameters": {"ensemble.gate": parameter}}))
    assert list(load_space(path, "digits").parameters) == ["ensemble.gate"]
    assert capsys.readouterr().err == f"bigbatch: {path}: {SAID[0]}\n"
    both = {"ensemble.gate": parameter, "ensemble.selection_margin": parameter}
    path.write_text(yaml.safe_dump({"parameters": both}))
    with pytest.raises(UserError, match=r"ensemble\.gate is the old name of"):
        load_space(path, "digits")


def test_of_several_ranks_one_says_it(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "bigbatch.launcher.cli", "train", "digits", OLD[0]]
    command += [f"data.path={tmp_path}", "--run", "x"]  # no shards there: it ends at once
    said = []
    for rank in ("0", "1"):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "::1"}
        variables |= {"LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "a"}
        done = subprocess.run(
            command, env=os.environ | variables, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 2
        said.append(done.stderr.count("is now called"))
    assert said == [1, 0]


def test_the_schema_knows_the_new_names_alone() -> None:
    text = json.dumps(Recipe.model_json_schema())
    assert "skip_steps" in text
    assert "step_over" not in text
    assert '"gate"' not in text
