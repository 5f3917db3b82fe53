"""What an export leaves on the disk, its card, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.index import open_index
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.folder import Ensemble, open_ensemble, write_ensemble
from bigbatch.trainers.ensemble.members import Member, find_members, save_snapshot
from bigbatch.trainers.evaluation.accuracy import wilson
from bigbatch.trainers.export.__main__ import main
from bigbatch.trainers.export.card import Score, model_card
from bigbatch.trainers.export.description import audits, data_hash, describe
from bigbatch.trainers.export.scores import known_scores
from bigbatch.trainers.export.write import export
from bigbatch.trainers.ledger.lines import DIGESTS, FIRST, chained
from bigbatch.trainers.models.weights_file import read_header, read_info
from bigbatch.trainers.planning.inputs import open_order
from bigbatch.trainers.recovery.tensor_files import save_weights
from tests.trainers.export.conftest import COMBINATION, noise


def snippet(card: str) -> str:
    """The card's Python."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    return code


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def run_snippet(card: Path) -> str:
    """What it prints for a photo in the folder of the card, with nothing of this product."""
    pixels = noise(30, 40, seed=5)
    Image.fromarray(np.stack([pixels] * 3, 2)).save(card.parent / "photo.jpg", quality=95)
    code = f"import sys\nsys.modules['bigbatch'] = None\n{snippet(card.read_text())}"
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=card.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_card_of_an_onnx_file_runs_it(onnx_file: Path, tmp_path: Path) -> None:
    for path in (onnx_file, onnx_file.with_name("two.onnx.md")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert re.fullmatch(r"\d 0\.\d+", run_snippet(tmp_path / "two.onnx.md"))
    assert len(snippet((tmp_path / "two.onnx.md").read_text()).splitlines()) <= 11


def test_the_page_serves_a_file(onnx_file: Path, tmp_path: Path) -> None:
    """docs/deploy.md's first program, as it stands, with nothing of this product."""
    page = Path(__file__).parents[3] / "docs" / "deploy.md"
    code = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)[0]
    shutil.copy(onnx_file, tmp_path / "digits.onnx")
    for number in range(3):
        picture = Image.fromarray(noise(20, 30, seed=number))
        picture.save(tmp_path / f"{number}.png")
    code = f"import sys\nsys.modules['bigbatch'] = None\n{code}\nprint(answer(sys.argv[1:])[0])"
    paths = [f"{number}.png" for number in range(3)]
    command = [sys.executable, "-I", "-c", code, *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert re.fullmatch(r"\['\d', '\d', '\d'\]\n", done.stdout), done.stderr


def test_timm_loads_a_network_by_its_config(members: list[Member], tmp_path: Path) -> None:
    member = members[1]
    written = export(tmp_path / "model.safetensors", [member], Combination())
    assert sorted(p.name for p in written) == [
        "config.json",
        "model.safetensors",
        "model.safetensors.md",
    ]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"] == list(member.classes)
    expected, images = member.build(), torch.randn(2, 1, 24, 24)
    by_path = timm.create_model(
        config["architecture"],
        num_classes=config["num_classes"],
        checkpoint_path=str(tmp_path / "model.safetensors"),
        **config["model_args"],
    )
    by_folder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for model in (by_path, by_folder):
        assert torch.equal(model.eval()(images), expected(images))
    data = timm.data.resolve_model_data_config(by_folder)
    recipe = member.recipe
    assert data["input_size"] == (1, 24, 24)
    evaluated = timm.data.resolve_model_data_config(by_folder, use_test_size=True)
    assert evaluated["input_size"] == (1, 28, 28)
    assert list(data["mean"]) == recipe.augment.mean
    assert list(data["std"]) == recipe.augment.std
    assert data["crop_pct"] == recipe.evaluate.crop_fraction
    assert data["interpolation"] == "bilinear"
    assert by_folder.pretrained_cfg["label_names"] == list(member.classes)
    # And it is a file of ours still, from which a run can start.
    assert read_info(read_header(tmp_path / "model.safetensors")) == member.info


@pytest.mark.slow
def test_the_cards_of_other_files_run_them(members: list[Member], tmp_path: Path) -> None:
    export(tmp_path / "weights.safetensors", members[:1], Combination())
    assert (tmp_path / "weights.json").exists()
    by_timm = run_snippet(tmp_path / "weights.safetensors.md").split()
    export(tmp_path / "program.pt2", members[:1], Combination())
    by_program = run_snippet(tmp_path / "program.pt2.md").split()
    assert by_timm[0] == by_program[0]
    # timm resizes first and cuts then, and rounds in between.
    assert float(by_timm[1]) == pytest.approx(float(by_program[1]), abs=0.05)


def test_what_weights_alone_cannot_say_is_refused(members: list[Member], tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"2 members; export \.onnx or \.pt2.*--members"):
        export(out, members, Combination())
    for combination in (COMBINATION, Combination("vote"), Combination(reject_below=0.5)):
        with pytest.raises(UserError, match=r"\.onnx or \.pt2"):
            export(out, members[:1], combination)
    recipe = members[0].recipe
    small = recipe.model.model_copy(update={"stem": "small", "name": "resnet10t", "options": {}})
    network = timm.create_model("resnet18", num_classes=10, in_chans=1)
    network.maxpool = torch.nn.Identity()
    network.conv1 = torch.nn.Conv2d(1, 64, 3, padding=1, bias=False)
    small = small.model_copy(update={"name": "resnet18"})
    path = tmp_path / "small.safetensors"
    save_weights(network, path)
    member = replace(members[0], weights=path, recipe=recipe.model_copy(update={"model": small}))
    with pytest.raises(UserError, match=r"model\.stem = small, which timm cannot build"):
        export(out, [member], Combination())
    assert list(tmp_path.iterdir()) == [path]


def test_members_of_weight_0_are_left_out(members: list[Member], tmp_path: Path) -> None:
    """Then there is one, whose weights alone are the model."""
    out = tmp_path / "model.safetensors"
    export(out, members, Combination("weights", weights=(0.0, 1.0)))
    assert read_info(read_header(out)) == members[1].info
    card = (tmp_path / "model.safetensors.md").read_text()
    assert members[1].name in card
    assert members[0].name not in card


@pytest.mark.parametrize("there", ["model.safetensors", "config.json", "model.safetensors.md"])
def test_nothing_that_exists_is_replaced(members: list[Member], tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(UserError, match=f"{there} exists already"):
        export(tmp_path / "model.safetensors", members[:1], Combination())
    assert [p.name for p in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


@pytest.mark.parametrize("name", ["model.pt", "model", "model.ONNX"])
def test_an_unknown_ending_is_refused(members: list[Member], tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"must end in \.onnx, \.pt2 or \.safetensors"):
        export(tmp_path / name, members[:1], Combination())


def test_a_member_whose_weights_are_damaged_is_named(members: list[Member], tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(members[0].weights.read_bytes()[:-100])
    broken = replace(members[0], name="digits/cycle-07", weights=path)
    with pytest.raises(UserError, match="digits/cycle-07"):
        export(tmp_path / "file.onnx", [members[0], broken], Combination())
    assert list(tmp_path.iterdir()) == [path]


def test_the_card_says_what_is_known(members: list[Member]) -> None:
    description = describe(members, COMBINATION, ["0123456789abcdef", None])
    scores = [
        Score("val", 0.9, 0.3, 0.05, images=181, chosen_by=True),
        Score("test", 0.85, 0.4, 0.06, images=None, chosen_by=False),
    ]
    card = model_card(Path("out/two.onnx"), description, scores)
    front = front_matter(card)
    assert front["library_name"] == "onnx"
    assert front["pipeline_tag"] == "image-classification"
    (entry,) = front["model-index"]
    assert entry["name"] == "two"
    assert [r["metrics"][0]["value"] for r in entry["results"]] == [0.9, 0.85]
    low, high = wilson(163, 181)
    assert f"| val | 181 | 90.00% | {low:.2%} to {high:.2%} | 0.3000 | 0.0500 |" in card
    assert "| test | not known | 85.00% | not known | 0.4000 | 0.0600 |" in card
    assert "Temperature 1.5" in card
    assert "below 0.4 count as rejected" in card
    assert "not calibrated" not in card
    assert "val took part in choosing" in card
    assert "test took part" not in card
    assert "| index `0123456789abcdef` |" in card
    assert "| not known |" in card
    recipes = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", card, re.S)]
    assert recipes == [m.recipe.model_dump(mode="json") for m in members]


def test_a_card_without_scores_has_none(members: list[Member]) -> None:
    card = model_card(Path("one.pt2"), describe(members[:1], Combination(), [None]), [])
    assert "model-index" not in front_matter(card)
    assert "Not measured" in card
    assert "not calibrated" in card
    assert "%" not in card.partition("## Scores")[2].partition("## Limits")[0]


def test_the_card_has_what_an_audit_certified(
    members: list[Member], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the run as it is: a certificate of another ledger is left out."""
    run = create_run(tmp_path / "run", members[0].recipe)
    line = chained(FIRST, 7, dict.fromkeys(DIGESTS, "0" * 16))
    run.ledger.write_text(to_json(line) + "\n")
    weights = run.path / "member.safetensors"
    weights.write_bytes(members[0].weights.read_bytes())
    member = replace(members[0], weights=weights)
    assert audits([member, member]) == []
    told = {"paragraph": "Audit of run:\n\npassed.", "ledger": {"step": 7, "chain": line["chain"]}}
    run.certificate.write_text(to_json(told))
    assert audits([member, member]) == ["Audit of run: passed."]
    written = export(tmp_path / "out" / "one.safetensors", [member], Combination())
    assert written[-1].read_text().endswith("## Audit\n\nAudit of run: passed.")
    told["ledger"] = {"step": 7, "chain": "f" * 32}
    run.certificate.write_text(to_json(told))
    assert audits([member]) == []
    assert "is no certificate of this run's ledger" in capsys.readouterr().err


SCORES = {"accuracy": 0.9, "nll": 0.3, "brier": 0.1, "ece": 0.05}


def test_scores_are_those_of_just_these_members(members: list[Member], tmp_path: Path) -> None:
    run = create_run(tmp_path / "digits", members[0].recipe)
    third = replace(members[0], name="digits/cycle-03")
    soup = replace(members[0], name="digits/soup")
    assert known_scores(run.path, members, Combination()) == []

    def entry(name: str, accuracy: float, kept: bool = True) -> dict:
        return {"name": name, **SCORES, "accuracy": accuracy, "kept": kept}

    val = {
        "members": [entry("cycle-01", 0.5), entry("cycle-02", 0.6), entry("cycle-03", 0.1, False)],
        "ensemble": {**SCORES, "accuracy": 0.7},
        "soup": {**SCORES, "accuracy": 0.8},
    }
    run.summary.write_text(to_json({"val": val}))
    images = len(open_index(Path(members[0].recipe.data.path) / "val"))

    def found(*chosen: Member) -> list:
        scores = known_scores(run.path, chosen, Combination())
        assert all(s.split == "val" and s.images == images for s in scores)
        return [(s.accuracy, s.chosen_by) for s in scores]

    assert found(*members) == [(0.7, True)]
    assert found(members[1]) == [(0.6, False)]
    assert found(third) == [(0.1, False)]
    assert found(soup) == [(0.8, True)]
    # Nobody has measured these.
    assert found(*members, third) == []
    assert found(members[0], soup) == []
    # Unless by `bigbatch evaluate`, of the same members in the same combination, without TTA.
    folder = run.path / "evaluations" / "test"
    folder.mkdir(parents=True)
    run.summary.unlink()
    evaluation = {
        "source": "shards/digits/test",
        "tta": "none",
        "combination": "mean",
        "member_names": [m.name for m in members],
        "samples": 44,
        **SCORES,
    }

    def evaluated(**changes: object) -> list[Score]:
        (folder / "evaluation.json").write_text(to_json(evaluation | changes))
        return known_scores(run.path, members, Combination())

    (score,) = evaluated()
    assert score == Score("test", 0.9, 0.3, 0.05, images=44, chosen_by=False)
    assert evaluated(source="shards/digits/val/")[0].chosen_by
    assert evaluated(tta="flip") == evaluated(mc_dropout=8) == evaluated(combination="vote") == []
    assert evaluated(member_names=[soup.name]) == []


def test_an_ensemble_has_the_scores_of_its_record(members: list[Member], tmp_path: Path) -> None:
    folder, reported = tmp_path / "both", {**SCORES, "samples": 44}
    record = {"reported_on": {"place": "shards/digits/test", "samples": 44}, "reported": reported}
    write_ensemble(folder, Ensemble(tuple(members), COMBINATION), record)
    ensemble = open_ensemble([folder])
    (score,) = known_scores(folder, ensemble.members, ensemble.combination)
    assert score == Score("test", 0.9, 0.3, 0.05, images=44, chosen_by=False)
    write_ensemble(tmp_path / "bare", Ensemble(tuple(members), COMBINATION))
    assert known_scores(tmp_path / "bare", members, COMBINATION) == []


def test_data_that_is_not_what_was_trained_on_is_not_named(
    members: list[Member], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, members)
    recipe = members[0].recipe
    index = open_index(Path(recipe.data.path) / "train")
    (member,) = find_members(run, "cycle-01")
    assert data_hash(member) == index.hash  # nothing says otherwise
    state = run.checkpoints / "step-00000010" / "state.json"
    state.parent.mkdir(parents=True)
    for order_hash, expected in ((open_order(recipe, index).hash, index.hash), ("0" * 16, None)):
        state.write_text(to_json({"fingerprint": {"order_hash": order_hash}}))
        assert data_hash(member) == expected
    assert "digits/cycle-01" in capsys.readouterr().err
    gone = recipe.data.model_copy(update={"path": str(tmp_path / "gone")})
    assert data_hash(replace(member, recipe=recipe.model_copy(update={"data": gone}))) is None


def run_of(folder: Path, members: list[Member]) -> RunDir:
    """A run whose snapshots are these members', all of the first one's recipe."""
    run = create_run(folder / "digits", members[0].recipe)
    for number, seed in enumerate((0, 0), 1):
        save_snapshot(run.snapshots, number, seed, members[0].build(), {}, members[0].info)
    return run


def test_the_command_says_what_it_wrote_and_checks_it(
    members: list[Member], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, members)
    out = tmp_path / "new" / "model.safetensors"
    arguments = [str(run.path), "--out", str(out), "--members", "cycle-02"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == str(out)
    assert found["members"] == ["digits/cycle-02"]
    assert found["bytes"] == out.stat().st_size
    assert sorted(found["written"]) == sorted(map(str, out.parent.iterdir()))
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    for wrong, says in (
        (["--out", "a.bin"], "must end in"),
        (["--out", "a.onnx", "--members", "cycle-09"], "no member 'cycle-09'"),
        (["--out", "a.safetensors", "--check"], "weights alone"),
    ):
        assert main([str(run.path), *wrong]) == 2
        assert says in capsys.readouterr().err


def test_a_file_that_is_there_is_checked_and_a_stale_one_found(
    onnx_file: Path, members: list[Member], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, members)
    before = onnx_file.read_bytes()
    arguments = [str(run.path), "--out", str(onnx_file), "--check", "--images", "2"]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert f"{onnx_file} was there already" in said
    assert "NOT as evaluated" in said
    assert onnx_file.read_bytes() == before
    assert main([*arguments, "--data", str(tmp_path / "gone")]) == 2
    assert str(tmp_path / "gone" / "val") in capsys.readouterr().err
