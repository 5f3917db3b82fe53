"""Branches of a run: what they take over, and what they refuse."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import change_recipe, load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher import fork
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.fork import Branch, find_checkpoint, make_branches, plan_branch
from bigbatch.trainers import worker
from bigbatch.trainers.recovery.stored import STATISTICS, verify

SMALL = (
    "model={name: test_resnet, options: {drop_rate: 0.2}}",
    "data={workers: 0, threads: 1, image_size: 16}",
    "log.wandb=off",
    "log.tensorboard=false",
    "duration=6 steps",
    "global_batch=64",
    "micro_batch=32",
    "schedule={name: cycles, cycles: 3, warmup: 1 steps, rewarmup: 0 steps}",
    "optimizer={name: sgd, lr: 0.1, momentum: 0.9}",
    "average={name: ema, half_life: 2 steps}",
    "augment.mixup=0.2",
    "checkpoint={every: 1 steps, keep: 9}",
    "evaluate.every=3 steps",
    "ensemble.soup=false",
)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigbatch.trainers.finish.say_results", lambda *_: [])  # takes seconds


@pytest.fixture(scope="module")
def parent(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    recipe = load_recipe("digits", [f"data.path={digits}", *SMALL])
    run = create_run(tmp_path_factory.mktemp("runs") / "trunk", recipe)
    assert worker.main([str(run.path)]) == 0
    return run


def planned(parent: RunDir, path: Path, step: int, *changes: str) -> tuple[Path, Branch]:
    recipe = change_recipe(parent.recipe(), changes)
    checkpoint = find_checkpoint(parent, step)
    return checkpoint, plan_branch(parent, checkpoint, path, recipe)


def branch(parent: RunDir, path: Path, step: int, *changes: str) -> RunDir:
    checkpoint, plan = planned(parent, path, step, *changes)
    return make_branches(parent, checkpoint, [plan])[0]


def ledger_lines(run: RunDir) -> list[str]:
    return [line for line in run.ledger.read_text().splitlines() if '"kind": "step"' in line]


def test_an_unchanged_branch_becomes_what_its_parent_became(parent: RunDir, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in parent.path.rglob("*") if p.is_file()}
    run = branch(parent, tmp_path / "b", 3)
    assert worker.main([str(run.path)]) == 0
    for name in ("model", "optimizer", "average"):
        ends = [r.checkpoints / "step-00000006" / f"{name}.safetensors" for r in (parent, run)]
        assert ends[0].read_bytes() == ends[1].read_bytes(), name
    for path in ("snapshots/cycle-01", "snapshots/cycle-02", "snapshots/cycle-03"):
        there = [load_file(r.path / path / "model.safetensors") for r in (parent, run)]
        assert all((there[0][key] == there[1][key]).all() for key in there[0])
    records = [read_jsonl(r.metrics) for r in (parent, run)]
    values = [[(r["step"], r["kind"], r.get("loss"), r.get("nll")) for r in x] for x in records]
    assert values[0] == values[1]
    assert ledger_lines(parent) == ledger_lines(run)
    assert len(ledger_lines(run)) == 6
    scores = [json.loads(r.summary.read_bytes()) for r in (parent, run)]
    assert scores[0]["test"] == scores[1]["test"]
    assert {p: p.read_bytes() for p in parent.path.rglob("*") if p.is_file()} == before
    origin = run.forked_from
    assert origin is not None
    assert (origin["run"], origin["step"], origin["at"]) == (str(parent.path), 3, 3)
    assert read_jsonl(run.events)[0]["kind"] == "fork"
    shown = CliRunner().invoke(cli, ["status", str(run.path)], env={"COLUMNS": "300"})
    assert f"step 3 of {parent.path}" in shown.output
    # Without its checkpoints a branch is nothing: it does not begin at step 0.
    shutil.rmtree(run.checkpoints)
    run.summary.unlink()
    assert worker.main([str(run.path)]) == 2


def test_another_batch_goes_on_at_the_same_sample(
    parent: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ("global_batch=32", "duration=10 steps", "schedule={name: cosine}")
    run = branch(parent, tmp_path / "b", 3, *changes, "log.trace=true")
    (checkpoint,) = run.checkpoints.iterdir()
    assert checkpoint.name == "step-00000006"
    verify(checkpoint)
    assert not (checkpoint / "average.safetensors").exists()
    assert worker.main([str(run.path), "--stop-at", "8"]) == 0
    assert "going on from an older one" not in capsys.readouterr().err
    traced = read_jsonl(run.trace / "rank-00000.jsonl")
    assert [record["step"] for record in traced] == [6, 7]
    other = branch(parent, tmp_path / "c", 3, "log.trace=true", "log.ledger_every=null")
    assert ledger_lines(other) == ledger_lines(parent)[:3]  # before its first step, too
    assert max(r["step"] for r in read_jsonl(other.metrics)) == 3
    assert worker.main([str(other.path), "--stop-at", "4"]) == 0
    assert ledger_lines(other) == ledger_lines(parent)[:3]
    whole = read_jsonl(other.trace / "rank-00000.jsonl")
    assert [r["samples"] for r in whole] == [r["samples"] for r in traced]
    with pytest.raises(UserError, match="192 samples, no whole number of steps of global_batch 5"):
        planned(parent, tmp_path / "d", 3, "global_batch=512", "micro_batch=32")


def test_a_number_goes_on_in_pieces_at_the_same_sample(parent: RunDir, tmp_path: Path) -> None:
    """Steps of 64 as before up to 192 samples, then steps of 32: the same samples, and records."""
    pieces = "[{batch: 64, until: 192 samples}, {batch: 32}]"
    changes = (f"global_batch={{name: stages, pieces: {pieces}}}", "schedule={name: constant}")
    changes = (*changes, "schedule.warmup=0 steps", "duration=20 steps", "log.trace=true")
    checkpoint, plan = planned(parent, tmp_path / "b", 3, *changes)
    assert (plan.step, plan.same_batch, plan.same_cycles) == (3, True, False)
    (run,) = make_branches(parent, checkpoint, [plan])
    assert worker.main([str(run.path), "--stop-at", "5"]) == 0
    kept = [r["step"] for r in read_jsonl(run.metrics) if r["kind"] == "train"]
    assert kept == [1, 2, 3, 4, 5]
    pieced = read_jsonl(run.trace / "rank-00000.jsonl")
    assert [(r["step"], r["micro"]) for r in pieced] == [(3, 0), (4, 0)]
    other = branch(parent, tmp_path / "c", 3, "log.trace=true")
    assert worker.main([str(other.path), "--stop-at", "4"]) == 0
    whole = read_jsonl(other.trace / "rank-00000.jsonl")
    assert [r["samples"] for r in whole] == [r["samples"] for r in pieced]
    # The other way, too, and from one change to another: the place is the same sample.
    checkpoint = find_checkpoint(run, 5)
    back = plan_branch(
        run, checkpoint, tmp_path / "d", change_recipe(run.recipe(), ["global_batch=32"])
    )
    assert (back.step, back.same_batch) == (8, False)
    larger = change_recipe(run.recipe(), ["global_batch=96"])
    with pytest.raises(UserError, match="256 samples, no whole number of steps of global_batch 96"):
        plan_branch(run, checkpoint, tmp_path / "d", larger)


def test_betas_that_a_branch_does_not_go_on_with_are_said(parent: RunDir, tmp_path: Path) -> None:
    pieces = "pieces: [{batch: 64, until: 192 samples}, {batch: 32}]"
    changes = (f"global_batch={{name: stages, betas: power, {pieces}}}", "duration=20 steps")
    changes = (*changes, "optimizer={name: adamw, lr: 0.001}", "schedule={name: constant}")
    checkpoint, plan = planned(parent, tmp_path / "b", 3, *changes, "schedule.warmup=0 steps")
    (run,) = make_branches(parent, checkpoint, [plan])
    assert worker.main([str(run.path), "--stop-at", "5"]) == 0
    for others, says in ((["global_batch=32"], True), ([], False)):
        recipe = change_recipe(run.recipe(), others)
        notes = plan_branch(run, find_checkpoint(run, 5), tmp_path / "d", recipe).notes
        assert any("kept by other betas" in note for note in notes) == says


def test_confusions_that_are_not_taken_over_are_said(parent: RunDir, tmp_path: Path) -> None:
    _, plan = planned(parent, tmp_path / "b", 3, "loss.name=confusion_cost")
    assert plan.notes == ("costs of loss confusion_cost are all 1 until the first evaluation",)


def test_another_optimizer_starts_without_state(parent: RunDir, tmp_path: Path) -> None:
    changes = ("optimizer={name: adamw, lr: 0.001}", "average={name: ema, half_life: 9 steps}")
    changes = (*changes, "duration=7 steps")
    checkpoint, plan = planned(parent, tmp_path / "b", 5, *changes)
    assert plan.notes == ("optimizer adamw starts without state", "the average (ema) starts anew")
    (run,) = make_branches(parent, checkpoint, [plan])
    assert worker.main([str(run.path), "--stop-at", "6"]) == 0
    state = load_file(run.checkpoints / "step-00000006" / "optimizer.safetensors")
    assert {float(v) for k, v in state.items() if k.startswith("step/")} == {1.0}


def test_muon_with_another_optimizer_for_the_rest_is_another_one() -> None:
    muon = "optimizer={name: muon, lr: 0.1, rest: {name: sgd, lr: 0.1}}"
    assert fork._optimizers(load_recipe("digits", [muon])) == ("muon", "sgd")
    assert fork._optimizers(load_recipe("digits")) == ("lars", None)


def test_a_branch_of_an_evaluated_step_has_training_s_own_statistics(
    parent: RunDir, tmp_path: Path
) -> None:
    """Its weights have those that they were evaluated with; training goes on with its own."""
    run = branch(parent, tmp_path / "b", 3)
    for name in (STATISTICS, "model.safetensors"):
        there, here = (r.checkpoints / "step-00000003" / name for r in (parent, run))
        assert there.read_bytes() == here.read_bytes()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("duration=3 steps", "no step left: its 3 steps are over after 3"),
        ("loss={name: center}", "network: loss learns"),
        ("model.recompute=true", ""),
        ("model.name=resnet18", "goes on with its parent's network: model.name"),
        ("model.options.drop_path_rate=0.1", ""),
        ("seed=5", ""),
    ],
)
def test_what_a_branch_may_change(parent: RunDir, tmp_path: Path, change: str, error: str) -> None:
    changes = (change, "schedule={name: cosine}", "augment.mixup=0")
    if not error:
        assert planned(parent, tmp_path / "b", 3, *changes)[1].step == 3
        return
    with pytest.raises(UserError, match=error):
        planned(parent, tmp_path / "b", 3, *changes)


def test_another_transfer_starts_without_state(parent: RunDir, tmp_path: Path) -> None:
    """Frozen weights have none, and those that are not any more would have nothing to go on by."""
    weights = find_checkpoint(parent, 5) / "model.safetensors"
    changes = (f"model.checkpoint={weights}", "transfer={name: head}", "duration=7 steps")
    checkpoint, plan = planned(parent, tmp_path / "b", 5, *changes)
    first, second = plan.notes
    assert (
        first == "optimizer sgd starts without state, for another transfer lets other weights learn"
    )
    assert second == "the average (ema) starts anew"
    (run,) = make_branches(parent, checkpoint, [plan])
    assert worker.main([str(run.path), "--stop-at", "6"]) == 0
    state = load_file(run.checkpoints / "step-00000006" / "optimizer.safetensors")
    assert set(state) == {"momentum_buffer/fc.weight", "momentum_buffer/fc.bias"}


def test_a_plateau_needs_the_steps_of_its_evaluations(parent: RunDir, tmp_path: Path) -> None:
    plateau = "schedule={name: plateau}"
    assert planned(parent, tmp_path / "b", 3, plateau)[1].same_batch
    with pytest.raises(UserError, match="schedule plateau looks at the evaluations"):
        planned(parent, tmp_path / "b", 3, plateau, "global_batch=32", "duration=9 steps")


def test_early_stopping_can_go_back_to_before_the_branch(parent: RunDir, tmp_path: Path) -> None:
    copied = RunDir(tmp_path / "copy")
    shutil.copytree(parent.path, copied.path)
    stop = ("schedule={name: cosine}", "regularise={early_stop: {patience: 9}}")
    changes = (*stop, "checkpoint.keep_best=1", "checkpoint.every=3 steps")
    run = branch(copied, tmp_path / "b", 5, *changes)
    scores = [(r["accuracy"], -r["step"]) for r in read_jsonl(run.metrics) if r["kind"] == "eval"]
    best = f"step-{-max(s for s in scores if -s[1] <= 5)[1]:08d}"
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [best, "step-00000005"]
    with pytest.raises(UserError, match="early_stop ends the branch where it begins, after step 5"):
        planned(copied, tmp_path / "c", 5, *changes, "regularise.early_stop={threshold: 0.9}",
                "regularise.early_stop.patience=1")  # fmt: skip
    shutil.rmtree(copied.checkpoints / best)
    with pytest.raises(UserError, match=f"{best} is not there any more"):
        planned(copied, tmp_path / "c", 5, *changes)


def test_a_run_that_is_there_is_gone_on_with_or_refused(parent: RunDir, tmp_path: Path) -> None:
    run = branch(parent, tmp_path / "b", 3)
    before = run.manifest.read_bytes()
    assert branch(parent, run.path, 3) == run
    assert run.manifest.read_bytes() == before
    elsewhere = parent.path / ".." / parent.path.name  # the same place, as by a link
    assert branch(RunDir(elsewhere), run.path, 3) == run
    for step, changes, error in (
        (4, (), rf"branched off elsewhere \({parent.path}, step 3\); choose another name"),
        (3, ("seed=5",), "another recipe: seed"),
    ):
        with pytest.raises(UserError, match=error):
            branch(parent, run.path, step, *changes)
    create_run(tmp_path / "c", parent.recipe())
    with pytest.raises(UserError, match="is another run"):
        branch(parent, tmp_path / "c", 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]


def test_damage_is_not_branched_off(parent: RunDir, tmp_path: Path) -> None:
    copied = RunDir(tmp_path / "copy")
    shutil.copytree(parent.path, copied.path)
    (copied.checkpoints / "step-00000003" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.json differs .* another step with --step"):
        find_checkpoint(copied, 3)
    with pytest.raises(UserError, match="after step 7; it has those after steps 1, 2, 3, 4, 5, 6"):
        find_checkpoint(copied, 7)
    (copied.snapshots / "cycle-01" / "metrics.json").write_text("{")
    with pytest.raises(UserError, match="cycle-01 does not say after which step it was taken"):
        branch(copied, tmp_path / "b", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    shutil.rmtree(copied.checkpoints)
    with pytest.raises(UserError, match="no checkpoint to branch off"):
        find_checkpoint(copied, None)


def test_members_branch_by_seed_from_the_command_line(parent: RunDir, tmp_path: Path) -> None:
    command = ["fork", f"{parent.path}@4", "--members", "2", "--no-train", "--runs", str(tmp_path)]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    runs = [RunDir(tmp_path / f"trunk-fork-{k}") for k in range(2)]
    assert [run.recipe().seed for run in runs] == [parent.recipe().seed, parent.recipe().seed + 1]
    for run in runs:
        assert (run.checkpoints / "step-00000004").is_dir()
        assert sorted(p.name for p in run.snapshots.iterdir()) == ["cycle-01", "cycle-02"]


def test_json_is_where_the_branches_stand(parent: RunDir, tmp_path: Path) -> None:
    where = ["--no-train", "--json", "--runs", str(tmp_path)]
    done = CliRunner().invoke(cli, ["fork", f"{parent.path}@4", *where], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert (done.exit_code, found["exit_status"], found["state"]) == (0, 0, "new")
    assert found["path"] == str(tmp_path / "trunk-fork")
    done = CliRunner().invoke(cli, ["fork", f"{parent.path}@4", "--members", "2", *where])
    names = [run["name"] for run in json.loads(done.stdout)["runs"]]
    assert names == ["trunk-fork-0", "trunk-fork-1"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["{}@x"], "after @ comes the step"),
        (["{}@2", "--step", "2"], "names a step, and --step 2 as well"),
        (["{}", "--at-once", "2"], "is how many of several --members"),
        (["nobody@3"], "no run 'nobody'"),
    ],
)
def test_refused(parent: RunDir, tmp_path: Path, arguments: list[str], error: str) -> None:
    command = ["fork", *(a.format(parent.path) for a in arguments), "--runs", str(tmp_path)]
    with pytest.raises(UserError, match=error):
        CliRunner().invoke(cli, command, catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []
