"""Transfer as a user sees it: what check prints, and the same weights on any ranks."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe, parse_recipe
from bigbatch.configs.model import Model
from bigbatch.configs.rundir import create_run
from bigbatch.launcher.child import bare_recipe
from bigbatch.launcher.cli.render import rates_table
from bigbatch.launcher.prove import prove
from bigbatch.trainers import worker
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.models.size import measure
from bigbatch.trainers.recovery.tensor_files import save_weights

SMALL = ("model.name=test_resnet", "data.workers=0", "log.wandb=off", "schedule={name: cosine}")
GRADUAL = "transfer={name: gradual, every: 2 steps, stages: 2, stage_decay: 0.5}"


def recipe_keys(weights: Path) -> list[str]:
    return [
        *SMALL,
        f"model.checkpoint={weights}",
        "duration=20 steps",
        "optimizer={name: lamb, lr: 0.01, weight_decay: 0.01}",
    ]


def test_check_says_which_stage_learns_at_which_rate() -> None:
    keys = [*recipe_keys(Path("w.safetensors")), GRADUAL]
    size = measure(load_recipe("digits", keys), 10, 1000)
    rows = [(r["stage"], r["lr"], r["weight_decay"], r["start"]) for r in size["rates"]]
    assert rows == [
        ("stem", None, 0.0, None),
        ("layer1", None, 0.0, None),
        ("layer2", 0.01 / 8, 0.01, 6),
        ("layer2", 0.01 / 8, 0.0, 6),
        ("layer3", 0.01 / 4, 0.01, 4),
        ("layer3", 0.01 / 4, 0.0, 4),
        ("layer4", 0.01 / 2, 0.01, 2),
        ("layer4", 0.01 / 2, 0.0, 2),
        ("head", 0.01, 0.01, 0),
        ("head", 0.01, 0.0, 0),
    ]
    assert sum(row["parameters"] for row in size["rates"]) == size["parameters"]
    cells = [list(column.cells) for column in rates_table(size["rates"]).columns]
    assert cells[5][0] == "frozen"
    assert (cells[0][2], cells[3][2], cells[5][2]) == ("layer2", "0.00125", "from step 6")
    assert cells[5][-1] == "from the start"


def test_a_probe_keeps_fewer_bytes_than_fine_tuning() -> None:
    keys = recipe_keys(Path("w.safetensors"))
    plain = measure(load_recipe("digits", keys), 10)
    probe = measure(load_recipe("digits", [*keys, "transfer={name: head}"]), 10)
    assert plain["rates"] == []
    assert probe["parameters"] == plain["parameters"]
    assert probe["gradient_bytes"] == 4 * (96 * 10 + 10)
    assert probe["optimizer_bytes"] < plain["optimizer_bytes"] / 50
    assert probe["activation_bytes"] < plain["activation_bytes"] / 5


def test_rates_by_layer_alone_are_said_too() -> None:
    keys = [*SMALL, "optimizer={name: sgd, lr: 0.1, layer_decay: 0.5}"]
    rates = measure(load_recipe("digits", keys), 10)["rates"]
    assert {row["lr"] for row in rates if row["stage"] == "head"} == {0.1}
    assert {row["lr"] for row in rates if row["stage"] == "stem"} == {0.1 / 2**5}


@pytest.mark.parametrize(
    ("written", "probed"),
    [
        ("{every: 9 epochs}", None),
        ("{every: 9 epochs, stage_decay: 0.5}", "{name: all, stage_decay: 0.5}"),
        ("{every: 9 epochs, rates: {head: 2}}", "{name: all, rates: {head: 2}}"),
        ("{every: 9 epochs, stages: 2}", "{name: frozen, stages: 2}"),
    ],
)
def test_probes_of_a_few_steps_train_what_learns_at_the_end(
    written: str, probed: str | None
) -> None:
    """For find-lr and find-micro-batch: the run that they start ends before a stage begins."""
    keys = recipe_keys(Path("w.safetensors"))
    recipe = load_recipe("digits", [*keys, "transfer={name: gradual, " + written[1:]])
    found = parse_recipe(bare_recipe(recipe, 3), "of a probe")
    assert found.transfer == load_recipe("digits", [*keys, f"transfer={probed or 'null'}"]).transfer


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    save_weights(build_model(Model(name="test_resnet"), classes=10, channels=1, seed=9), path)
    return path


def test_a_run_that_is_resumed_where_a_stage_begins_is_the_same(
    digits: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigbatch.trainers.run.finish", lambda *_: None)  # takes seconds
    keys = [
        *recipe_keys(weights),
        f"data.path={digits}",
        *("global_batch=32", "micro_batch=32", "duration=5 steps", "evaluate.every=9 steps"),
        *("transfer={name: gradual, every: 2 steps, stages: 3}", "checkpoint.every=1 steps"),
    ]
    runs = [create_run(tmp_path / name, load_recipe("digits", keys)) for name in ("a", "b")]
    for stops in ([], ["--stop-at", "2"]), ([], []):
        for run, more in zip(runs, stops, strict=True):
            assert worker.main([str(run.path), *more]) == 0
    found = [load_file(run.checkpoints / "step-00000005" / "model.safetensors") for run in runs]
    states = [load_file(run.checkpoints / "step-00000005/optimizer.safetensors") for run in runs]
    for one, other in (found, states):
        assert one.keys() == other.keys()
        assert all((one[name] == other[name]).all() for name in one)
    counts = {n: int(v) for n, v in states[0].items() if n.startswith("step/")}
    assert counts["step/fc.weight"] == 5
    assert counts["step/layer4.0.conv1.weight"] == 3
    assert counts["step/layer3.0.conv1.weight"] == 1
    assert not any("layer2" in name for name in counts)
    given = load_file(weights)
    frozen = [n for n in given if n.startswith(("conv1", "bn1", "layer1", "layer2"))]
    assert all((given[name] == found[0][name]).all() for name in frozen)
    events = [e for e in read_jsonl(runs[1].path / "events.jsonl") if e["kind"] == "unfreeze"]
    assert [(e["step"], e["stages"]) for e in events] == [(2, ["layer4"]), (4, ["layer3"])]


@pytest.mark.slow
def test_gradual_unfreezing_is_the_same_on_any_ranks_and_over_resumes(
    digits: Path, weights: Path, tmp_path: Path
) -> None:
    """Stages begin at steps 2, 4 and 6, where checkpoints are; the proof kills at one of them."""
    keys = [
        *recipe_keys(weights),
        GRADUAL,
        f"data.path={digits}",
        *("global_batch=64", "micro_batch=16", "reduction=exact", "evaluate.every=3 steps"),
        *("regularise.max_norm=2", "average={name: ema, half_life: 3 steps}"),
        "model.options={drop_path_rate: 0.3, drop_rate: 0.2}",
    ]
    recipe = load_recipe("digits", keys)
    found = prove(recipe, tmp_path, steps=8, ranks=(1, 2), say=lambda text: None)
    assert [result.difference for result in found] == [0.0, 0.0]
    assert all(result.passed for result in found)
    runs = {name: tmp_path / name for name in ("ranks-1", "killed")}
    events = list(read_jsonl(runs["ranks-1"] / "events.jsonl"))
    begun = [(e["step"], e["stages"]) for e in events if e["kind"] == "unfreeze"]
    assert begun == [(2, ["layer4"]), (4, ["layer3"]), (6, ["layer2"])]
    (table,) = [e["rates"] for e in events if e["kind"] == "transfer"]
    assert {row["stage"] for row in table} == {
        "stem",
        "layer1",
        "layer2",
        "layer3",
        "layer4",
        "head",
    }
    given = load_file(weights)
    newest = sorted((runs["killed"] / "checkpoints").glob("step-*"))[-1]
    trained = load_file(newest / "model.safetensors")
    same = {n.partition(".")[0] for n in given if (given[n] == trained[n]).all()}
    assert {"conv1", "bn1", "layer1"} <= same
    frozen = [n for n in given if n.startswith(("conv1", "bn1", "layer1"))]
    assert all((given[name] == trained[name]).all() for name in frozen)  # statistics too


@pytest.mark.slow
def test_check_prints_the_table(digits: Path, weights: Path) -> None:
    from bigbatch.launcher.cli.main import cli

    keys = [*recipe_keys(weights), GRADUAL, f"data.path={digits}"]
    result = CliRunner().invoke(cli, ["check", "digits", *keys])
    assert result.exit_code == 0, result.output
    assert "what learns, before the schedule" in result.output
    assert "from step 6" in result.output
    found = json.loads(CliRunner().invoke(cli, ["check", "digits", *keys, "--json"]).output)
    assert found["rates"][0]["stage"] == "stem"
