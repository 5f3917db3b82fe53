"""That what two runs differ in first is named: the step, and what in it."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import change_recipe, load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.index import build_index
from bigbatch.launcher.batches import batches
from bigbatch.launcher.fork import find_checkpoint, make_branches, plan_branch
from bigbatch.trainers import loop
from bigbatch.trainers.engine.determinism import choose_algorithms
from bigbatch.trainers.replay.__main__ import main
from bigbatch.trainers.replay.apart import look_below
from bigbatch.trainers.replay.past import find_past, whence
from bigbatch.trainers.replay.replay import open_replay
from bigbatch.trainers.replay.traced import STAGES, Trace, Tracer, compare_traces
from tests.helpers.archives import alter
from tests.trainers.replay.conftest import copied, small, train_here, untouched
from tests.trainers.replay.test_audit import flip

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def sparse(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Forty steps, with a line of the ledger at every tenth and at checkpoints."""
    changes = ["log.ledger_every=10", "checkpoint.every=12 steps", "evaluate.every=60 steps"]
    changes += ["duration=60 steps", "log.diagnosis=false"]
    recipe = load_recipe("digits", small(digits, *changes))
    run = create_run(tmp_path_factory.mktemp("runs") / "sparse", recipe)
    assert train_here(run, 40) == 0
    return run


def branch(run: RunDir, step: int, path: Path, *changes: str) -> RunDir:
    checkpoint = find_checkpoint(run, step)
    plan = plan_branch(run, checkpoint, path, change_recipe(run.recipe(), changes))
    return make_branches(run, checkpoint, [plan])[0]


def below(
    a: RunDir, b: RunDir, capsys: pytest.CaptureFixture[str], status: int = 1
) -> dict[str, Any]:
    capsys.readouterr()  # of training
    with untouched(a), untouched(b):
        assert main(["diff", str(a.path), str(b.path), "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def stages(found: dict[str, Any]) -> dict[str, Any]:
    return {one["stage"]: one for one in found["below"]["stages"]}


def test_a_rate_that_changes_is_named_as_the_update_of_its_step(
    sparse: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 37, though the ledgers say no more than that 36 is the same, and 40 is not."""
    run = branch(sparse, 36, tmp_path / "faster", "optimizer.lr=4")
    assert train_here(run, 40) == 0
    found = below(sparse, run, capsys)
    assert (found["parting"]["step"], found["parting"]["after"]) == (40, 36)
    assert (found["below"]["step"], found["below"]["first"]) == (37, "update")
    assert [side["start"] for side in found["below"]["sides"]] == [36, 36]
    assert all(side["again"] is True for side in found["below"]["sides"])
    own = stages(found)
    same = [name for name in STAGES if not own[name]["differ"]]
    assert same == [*list(STAGES)[:8], "buffers"]
    assert all(own[name]["compared"] for name in STAGES)
    assert own["settings"]["where"] == "lr of group 0"
    assert own["settings"]["values"] == ["2.0", "4.0"]
    assert found["evaluations"] == []
    assert main(["diff", str(sparse.path), str(run.path)]) == 1
    said = capsys.readouterr().out
    assert "step 37 differs first in the update: " in said
    assert "lr of group 0: 2.0 in A, 4.0 in B" in said
    assert "\n\nevaluations: none of either run\n\n" in said
    assert said.splitlines()[-1] == "step 37 is the first that differs: the update"


@SLOW
def test_what_no_recipe_explains_did_not_come_out_again(
    preempted: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step that was made with another rate than the recipe's."""
    run = copied(preempted, tmp_path)
    for step in (6, 7):
        shutil.rmtree(run.checkpoints / f"step-{step:08d}")
    honest, steps = loop.set_lr, iter(range(4, 99))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "set_lr", lambda o, m: honest(o, m * 2 if next(steps) == 4 else m))
        assert train_here(run, 7) == 0
    assert main(["diff", str(preempted.path), str(run.path)]) == 1
    said = capsys.readouterr().out
    assert "step 5 differs first in: weights; step 4 is the same in all\n  the update: " in said
    assert "B did not come out as recorded: step 5: weights in the ledger recorded " in said
    assert "A did not" not in said
    assert "the replays are the same in all: what differs on record did not come out again" in said


def test_one_altered_pixel_names_its_sample(
    preempted: RunDir, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(digits, tmp_path / "shards")
    steps = [
        [k for b in batches(preempted.recipe(), range(s, s + 1)) for k in b.keys] for s in (0, 1)
    ]
    place, key = next((i, k) for i, k in enumerate(steps[1]) if k not in steps[0])
    alter(tmp_path / "shards/train/000000.tar", key, (3, 3))
    build_index(tmp_path / "shards/train")
    recipe = change_recipe(preempted.recipe(), [f"data.path={tmp_path / 'shards'}"])
    run = create_run(tmp_path / "altered", recipe)
    assert train_here(run, 3) == 0
    found = below(preempted, run, capsys)
    assert (found["below"]["step"], found["below"]["first"]) == (2, "keys")
    own = stages(found)
    name = f"{key}, micro-batch {place // 4}, place {place % 4}"
    assert own["state"]["differ"] == 0
    assert own["keys"] | {"values": None} == {
        "stage": "keys", "compared": 16, "differ": 1, "where": name, "values": None
    }  # fmt: skip
    assert own["pixels"]["where"].startswith(f"{key}, ") or own["pixels"]["differ"] == 2  # mixup
    assert own["output"]["where"] == f"conv1.0, micro-batch {place // 4}, call 1"


def test_one_flipped_bit_of_a_weight_names_its_layer(
    preempted: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(preempted, tmp_path)
    for step in (6, 7):
        shutil.rmtree(run.checkpoints / f"step-{step:08d}")
    path = run.checkpoints / "step-00000004" / "model.safetensors"
    name = flip(path, lambda tensors: "layer2.0.conv2.weight")
    assert train_here(run, 6) == 0
    found = below(preempted, run, capsys)
    assert (found["parting"]["step"], found["parting"]["after"]) == (5, 4)
    assert (found["below"]["step"], found["below"]["first"]) == (5, "state")
    own = stages(found)
    assert (own["state"]["where"], own["state"]["differ"]) == (name, 1)
    assert own["pixels"]["differ"] == own["targets"]["differ"] == 0
    assert own["output"]["where"].startswith("layer2.0.conv2, micro-batch 0, call ")
    assert main(["diff", str(preempted.path), str(run.path)]) == 1
    assert "`bigbatch audit` says whose checkpoint was changed" in capsys.readouterr().out
    text = run.recipe_file.read_text()
    run.recipe_file.write_text(text.replace(run.recipe().data.path, str(tmp_path / "nowhere")))
    assert main(["diff", str(run.path), str(preempted.path)]) == 1
    said = capsys.readouterr().out
    assert "not made again, so not looked at below its digests: data.path " in said
    assert said.splitlines()[-1] == "step 5 is the first that differs"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(["regularise.sharpness={name: sam}"], marks=SLOW),
        pytest.param(["optimizer={name: lbfgs, lr: 0.1}"], marks=SLOW),
        pytest.param(["loss=jsd", "augment.mixup=0", "augment.ops=[augmix]"], marks=SLOW),
        pytest.param(["reduction=overlapped", "augment.cutmix=1.0", "loss=bce"], marks=SLOW),
        pytest.param(
            ["model={name: test_vit, options: {img_size: 16, patch_size: 8}}"], marks=SLOW
        ),
    ],
    ids=lambda change: change[0].partition("=")[2][:16],
)
def test_a_step_is_the_same_as_itself_in_all_stages(
    change: list[str], digits: Path, tmp_path: Path
) -> None:
    run = create_run(tmp_path / "one", load_recipe("digits", small(digits, *change)))
    run.metrics.write_text('{"kind": "train", "step": 1}\n')

    def traced() -> Trace:
        with open_replay(find_past(run, 1)) as replay:
            return Tracer(replay).step()

    ours, theirs = traced(), traced()
    found = compare_traces(ours, theirs)
    assert all(one.differ == 0 for one in found)
    empty = {one.stage for one in found if not one.compared}
    assert empty <= {"buffers"}
    assert len(ours.stages["keys"]) == len(ours.stages["pixels"]) == 16
    passes = 8 if "sam" in change[0] else 4
    assert len(ours.stages["loss"]) == passes
    weights = sum(p.requires_grad for p in replayed_parameters(run))
    assert len(ours.stages["micro_gradient"]) == 4 * weights
    assert len(ours.stages["gradient"]) == weights


def replayed_parameters(run: RunDir) -> list[Any]:
    with open_replay(find_past(run, 1)) as replay:
        return list(replay.engine.module.parameters())


@SLOW
def test_an_unchanged_branch_equals_its_parent_in_every_step(
    preempted: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = branch(preempted, 4, tmp_path / "again")
    assert train_here(run, 7) == 0
    same, pasts = whence((preempted, run), 7, None)
    assert same == 4
    found = look_below(same, pasts)
    assert (found.step, found.first) == (None, None)
    assert all(side.again is True for side in found.sides)


def test_what_one_run_asks_of_cublas_is_set_before_the_other_one_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run of determinism none first, then one of full: cuBLAS reads its variable once."""
    seen: list[str | None] = []

    def opened(*_: Any) -> Any:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise UserError("opened")

    # Absent, and absent again once this test is over.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("bigbatch.trainers.replay.apart.open_replay", opened)
    pasts = tuple(
        SimpleNamespace(step=1, recipe=SimpleNamespace(determinism=d)) for d in ("none", "full")
    )
    try:
        with pytest.raises(UserError, match="opened"):
            look_below(0, pasts)  # type: ignore[arg-type]
    finally:
        choose_algorithms(deterministic=False)
    assert seen == [":4096:8"]
