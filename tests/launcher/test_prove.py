"""The proof's instruments: each must be able to find a difference.

tests/test_main_job.py runs the whole proof.
"""

import json
from pathlib import Path
from shutil import which

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import iter_jsonl
from bigbatch.configs.identity import recipe_hash
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.child import Children
from bigbatch.launcher.prove import (
    Result,
    RunFailed,
    as_json,
    compare,
    not_reached,
    proof_recipe,
    prove,
    read_trace,
    relative_difference,
    run_to_end,
)
from bigbatch.trainers.models.build import build_model

pytestmark = pytest.mark.usefixtures("forked")
DIGITS = load_recipe("digits", ["global_batch=256", "micro_batch=64"])


def difference(tmp_path: Path, a: dict[str, object], b: dict[str, object]) -> float:
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path, tensors in zip(paths, (a, b), strict=True):
        save_file({name: np.array(value) for name, value in tensors.items()}, path)
    return relative_difference(*paths)


def test_relative_difference(tmp_path: Path) -> None:
    one = {"w": np.float32([1, -4]), "n": np.int64(3)}
    assert difference(tmp_path, one, one) == 0.0
    moved = {"w": np.float32([1, -4.004]), "n": np.int64(3)}
    assert difference(tmp_path, moved, one) == pytest.approx(1e-3, rel=1e-4)
    counted = {"w": np.float32([1, -4]), "n": np.int64(4)}
    assert difference(tmp_path, counted, one) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"w": np.float32([1])}, {"v": np.float32([1])}),
        ({"w": np.float32([1])}, {"w": np.float32([1]), "v": np.float32([1])}),
        ({"w": np.float32([1])}, {"w": np.float32([1, 1])}),
        ({"w": np.float32([np.nan])}, {"w": np.float32([1])}),
        ({"w": np.float32([1])}, {"w": np.float32([np.inf])}),
        ({"w": np.float32([1])}, {"w": np.float32([0])}),
    ],
    ids=["name", "missing", "shape", "nan", "infinity", "zero"],
)
def test_what_cannot_be_compared_differs_infinitely(
    tmp_path: Path, a: dict[str, object], b: dict[str, object]
) -> None:
    assert difference(tmp_path, a, b) == float("inf")


def test_bit_for_bit_is_stricter_than_equal(tmp_path: Path) -> None:
    zero, minus_zero = {"w": np.float32([0.0])}, {"w": np.float32([-0.0])}
    assert 0 < difference(tmp_path, zero, minus_zero) < 1e-300
    last_bit = {"w": np.nextafter(np.float32([1]), np.float32(2))}
    assert 0 < difference(tmp_path, last_bit, {"w": np.float32([1])}) < 2e-7


@pytest.mark.parametrize("limit", [0.0, 1e-5])
def test_averaged_weights_are_compared_too(tmp_path: Path, limit: float) -> None:
    runs = [RunDir(tmp_path / name) for name in ("a", "b")]
    for number, run in enumerate(runs):
        folder = run.checkpoints / "step-00000004"
        folder.mkdir(parents=True)
        for name in ("model", "optimizer", "average"):
            other = number and name != "model"  # optimizer state is compared bit for bit or not
            save_file({"w": np.float64([1, 1 + 1e-3 * other])}, folder / f"{name}.safetensors")

    def difference() -> float:
        return compare(runs[1], runs[0], ranks=1, with_="1 rank", limit=limit).difference

    assert difference() == pytest.approx(1e-3)
    (runs[1].checkpoints / "step-00000004" / "average.safetensors").unlink()
    assert difference() == float("inf")
    (runs[0].checkpoints / "step-00000004" / "average.safetensors").unlink()
    assert difference() == (pytest.approx(1e-3) if limit == 0 else 0.0)


def trace(folder: Path, name: str, *records: tuple[int, int, list[int]]) -> None:
    lines = [json.dumps({"step": s, "micro": m, "samples": x}) + "\n" for s, m, x in records]
    (folder / name).write_text("".join(lines))


def test_a_trace_is_merged_over_ranks_and_restarts(tmp_path: Path) -> None:
    trace(tmp_path, "rank-00000.jsonl", (0, 0, [1, 2]), (1, 0, [3, 4]), (1, 0, [3, 4]))
    trace(tmp_path, "rank-00001.jsonl", (0, 1, [5, 6]))
    assert read_trace(tmp_path) == {(0, 0): (1, 2), (1, 0): (3, 4), (0, 1): (5, 6)}
    # The order of samples inside a micro-batch matters.
    trace(tmp_path, "rank-00001.jsonl", (0, 0, [2, 1]))
    with pytest.raises(RunFailed, match="read twice, with different samples"):
        read_trace(tmp_path)


def test_the_proofs_recipe_trains_the_same_weights() -> None:
    recipe = proof_recipe(DIGITS)
    assert recipe_hash(recipe) == recipe_hash(DIGITS)
    assert (recipe.log.trace, str(recipe.checkpoint.every)) == (True, "2 steps")


@pytest.mark.parametrize(
    ("steps", "ranks", "says"),
    [
        (1, (1, 2), "--steps 1"),
        (10, (1, 5), "5 ranks"),
        (10, (2, 2), "--ranks"),
        (10, (), "--ranks"),
    ],
)
def test_what_cannot_be_proved(
    tmp_path: Path, steps: int, ranks: tuple[int, ...], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        prove(DIGITS, tmp_path, steps=steps, ranks=ranks)
    assert list(tmp_path.iterdir()) == []


def test_a_change_beyond_the_proven_steps_is_said(digits: Path) -> None:
    pieces = "[{batch: 64, until: 640 samples}, {batch: 128, until: 1280 samples}, {batch: 256}]"
    growing = f"global_batch={{name: stages, pieces: {pieces}}}"
    recipe = load_recipe("digits", [growing, f"data.path={digits}"])
    assert not_reached(recipe, 10) == (
        "global_batch changes at step 10, which 10 steps do not reach; --steps 12 does"
    )
    assert not_reached(recipe, 12) == (
        "global_batch changes again at step 15, which 12 steps do not reach; --steps 17 does"
    )
    assert not_reached(recipe, 17) is None
    assert not_reached(DIGITS, 2) is None


@pytest.mark.slow
def test_a_run_that_fails_is_no_proof(tmp_path: Path) -> None:
    recipe = load_recipe("digits", [f"data.path={tmp_path}/nowhere"])
    with pytest.raises(RunFailed, match=r"ended with status 2:\n(.*\n)*.*nowhere"):
        prove(recipe, tmp_path, ranks=(1, 2), say=lambda text: None)


def test_one_difference_is_enough() -> None:
    same = Result(2, "1 rank", None, None, 40, True, 0.0, 1e-5)
    other = Result(3, "1 rank", None, None, 40, True, 2e-5, 1e-5)
    samples = Result(4, "1 rank", None, None, 40, False, 0.0, 1e-5)
    assert [r.passed for r in (same, other, samples)] == [True, False, False]
    assert json.loads(as_json([same], 10))["proven"] is True
    assert json.loads(as_json([same, other], 10))["proven"] is False
    infinite = Result(4, "1 rank", None, None, 40, True, float("inf"), 1e-5)
    assert '"difference": null' in as_json([infinite], 10)  # JSON has no infinity


SMALL = (
    *("model.name=test_resnet", "data.image_size=16", "augment.affine=null", "model.options={}"),
    *("global_batch=96", "micro_batch=24", "data.workers=0", "data.sampling=uniform"),
)
# Everything that looks at a step as a whole, or draws at random inside the model.
CRAFT = (
    "loss={name: focal_softmax, class_weights: {name: effective_number, beta: 0.99}}",
    "optimizer={name: sgd, lr: 0.05, nesterov: true, weight_decay_of: {'type:Conv2d': 1e-4}}",
    "optimizer.momentum_schedule={name: constant, warmup: 4 steps, warmup_start: 0.5}",
    "regularise={l1: 1e-5, max_norm: 2, drop_connect: 0.2, input_noise: 0.1}",
    "regularise.sharpness={name: asam}",
)


STAGES = "{name: stages, pieces: [{batch: 24, until: 40 samples}, {batch: 96}], lr: sqrt}"
# Beside a batch that changes: all that counts samples, or spans steps.
CHANGING = (
    "global_batch.batch_norm=power",
    "evaluate={every: 200 samples, precise_bn: always, precise_bn_images: 96}",
    *("average={name: ema, half_life: 300 samples}", "checkpoint.every=2 steps"),
    "schedule={name: cosine, warmup: 100 samples}",
)


@pytest.mark.slow
def test_the_proof_holds_for_a_batch_that_changes(digits: Path, tmp_path: Path) -> None:
    """Two steps have one micro-batch for two ranks; a kill is before, at or after the second."""
    keys = [*SMALL, f"global_batch={STAGES}", *CHANGING, f"data.path={digits}", "reduction=exact"]
    keys += ["evaluate={every: 1 epochs, precise_bn: never}", "log.diagnosis=false"]  # takes time
    recipe = load_recipe("digits", keys, say=None)
    results = prove(recipe, tmp_path, steps=4, ranks=(1, 2), say=lambda text: None)
    assert [result.difference for result in results] == [0.0, 0.0]
    assert [result.batches for result in results] == [2 + 2 * 4] * 2
    records = list(iter_jsonl(tmp_path / "ranks-2" / "metrics.jsonl"))
    steps = [r for r in records if r["kind"] == "train"]
    assert [(r["global_batch"], r["samples"]) for r in steps] == [
        *((24, 24), (24, 48)),
        *((96, 144), (96, 240)),
    ]
    epochs = [r["samples"] / r["epoch"] for r in steps]
    assert epochs == pytest.approx([1078] * 4, rel=1e-4)
    images_per_s = [r["images_per_s"] * r["step_s"] for r in steps]
    assert images_per_s == pytest.approx([24, 24, 96, 96])
    assert ["grad_sq_micro" in r for r in steps] == [False] * 2 + [True] * 2
    for name in ("ranks-1", "killed"):  # averages, too, are the same on any ranks, and resumed
        others = [r for r in iter_jsonl(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"]
        for key in ("grad_sq_micro", "noise_scale"):
            assert [r.get(key) for r in others] == [r.get(key) for r in steps]
    for path in (tmp_path / "ranks-2", tmp_path / "killed"):  # and what it read
        traced = read_trace(RunDir(path).trace)
        assert sorted(traced) == [(s, m) for s in range(4) for m in range(4 if s > 1 else 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batches", "reduction", "limit"),
    [
        ("{name: doubling, start: 24, every: 48 samples, most: 96, lr: linear}", "exact", 0.0),
        ("{name: linear, start: 24, end: 96, until: 150 samples, by: 24}", "exact", 0.0),
        ("{name: post_local, batch: 96, workers: 4, every: 2, start: 100 samples}", "exact", 0.0),
        # Larger first: DDP settles its buckets in step 0, before ranks have nothing to do.
        ("{name: stages, pieces: [{batch: 96, until: 90 samples}, {batch: 24}]}", "exact", 0.0),
        (
            "{name: stages, pieces: [{batch: 96, until: 90 samples}, "
            "{batch: 24, until: 140 samples}, {batch: 48, until: 280 samples}, {batch: 96}]}",
            "overlapped",
            1e-5,
        ),
    ],
)
def test_the_proof_holds_for_every_kind_of_change(
    digits: Path, tmp_path: Path, batches: str, reduction: str, limit: float
) -> None:
    apart = "post_local" in batches  # whose updates are of one batch, so that no rule holds for it
    keys = [*SMALL, f"global_batch={batches}", *CHANGING[apart:], f"data.path={digits}"]
    if apart or reduction == "overlapped":  # LARS at a rate of 2 makes 4e-4 of a rounding
        keys.append("optimizer={name: sgd, lr: 0.005, momentum: 0.9}")
    recipe = load_recipe("digits", [*keys, f"reduction={reduction}"], say=None)
    ranks = (1, 2, 4) if apart else (1, 2, 3, 4)
    results = prove(recipe, tmp_path, steps=7, ranks=ranks, say=lambda text: None)
    assert all(result.passed for result in results)
    assert all(result.difference <= limit for result in results[:-1])
    assert results[-1].difference == 0.0


@pytest.mark.slow
def test_the_proof_holds_for_rules_of_betas_and_decay_and_a_batch_decided_on(
    digits: Path, tmp_path: Path
) -> None:
    adamw = "{name: adamw, lr: 0.01, betas: [0.8, 0.95], weight_decay: 0.1}"
    rules = "lr: sqrt, betas: power, weight_decay: timescale"
    batch = f"{{name: noise_scale, start: 48, most: 96, every: 96 samples, target: 100, {rules}}}"
    keys = [*SMALL, f"global_batch={batch}", *CHANGING, f"data.path={digits}", "reduction=exact"]
    recipe = load_recipe("digits", [*keys, f"optimizer={adamw}"], say=None)
    said: list[str] = []
    results = prove(recipe, tmp_path, steps=7, ranks=(1, 3), say=said.append)
    assert [result.difference for result in results] == [0.0, 0.0]
    assert all(result.passed for result in results)
    assert not any("not reach" in text for text in said)
    steps = [r for r in iter_jsonl(tmp_path / "killed" / "metrics.jsonl") if r["kind"] == "train"]
    assert {48, 96} == {r["global_batch"] for r in steps}


@pytest.mark.slow
def test_the_proof_holds_for_muon_and_precise_batch_norm(digits: Path, tmp_path: Path) -> None:
    """Evaluated in the step whose weights are compared: both kinds of statistics are."""
    keys = [
        "optimizer={name: muon, lr: 0.1, momentum: 0.6, rest: {name: lamb, lr: 0.03}}",
        "evaluate={every: 5 steps, precise_bn: always, precise_bn_images: 200}",
    ]
    recipe = load_recipe("digits", [*SMALL, *keys, f"data.path={digits}", "reduction=exact"])
    results = prove(recipe, tmp_path, steps=5, ranks=(1, 2, 3), say=lambda text: None)
    assert [result.difference for result in results] == [0.0, 0.0, 0.0]
    (last,) = (tmp_path / "killed" / "checkpoints").glob("step-00000005")
    assert (last / "batch_stats.safetensors").exists()


@pytest.mark.slow
def test_the_proof_holds_for_losses_and_regularisation(digits: Path, tmp_path: Path) -> None:
    recipe = load_recipe("digits", [*SMALL, *CRAFT, f"data.path={digits}", "reduction=exact"])
    results = prove(recipe, tmp_path, steps=5, ranks=(1, 2), say=lambda text: None)
    assert [result.difference for result in results] == [0.0, 0.0]
    assert all(result.passed for result in results)


@pytest.mark.slow
@pytest.mark.skipif(not (which("g++") or which("clang++")), reason="there is no C++ compiler")
def test_the_proof_holds_for_a_compiled_network_with_dropout(digits: Path, tmp_path: Path) -> None:
    """Masks of every kind, and a loss that looks inside; evaluated, and not compiled, half-way."""
    keys = [
        "model={name: 'tests.helpers.nets:convolutions', compile: true, options: {dropout: 0.3}}",
        *("evaluate.every=2 steps", "optimizer={name: sgd, lr: 0.05, nesterov: true}"),
        *("regularise={input_noise: 0.1}", "loss={name: large_margin}", "augment.mixup=0"),
    ]
    recipe = load_recipe("digits", [*SMALL, *keys, f"data.path={digits}", "reduction=exact"])
    results = prove(recipe, tmp_path, steps=5, ranks=(1, 2), say=lambda text: None)
    assert [result.difference for result in results] == [0.0, 0.0]
    assert all(result.passed for result in results)
    (weights,) = (tmp_path / "killed" / "checkpoints").glob("step-00000005/model.safetensors")
    plain = build_model(recipe.model, classes=10, channels=1, seed=0, image_size=16)
    assert load_file(weights).keys() == plain.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "fsdp2"])
@pytest.mark.parametrize(
    "loss", ["{name: large_margin, class_weights: balanced}", "{name: center, weight: 0.1}"]
)
def test_a_backend_that_holds_pieces_gives_the_weights_of_ddp(
    digits: Path, tmp_path: Path, backend: str, loss: str
) -> None:
    """Losses that look at the classifier, or learn; masks and noise; penalties, where they go."""
    drop, penalty = 0.2 * ("center" in loss), 1e-5 * (backend == "zero2")
    keys = [
        *(*SMALL, f"loss={loss}", "augment.mixup=0", "reduction=overlapped"),
        f"regularise={{drop_connect: {drop}, input_noise: 0.1, l1: {penalty}, l2: {penalty}}}",
        *("optimizer={name: sgd, lr: 0.02, weight_decay: 0}", f"data.path={digits}"),
    ]
    runs = []
    with Children(1, threads=1) as children:
        for name, ranks in (("ddp", 1), (backend, 2)):
            recipe = load_recipe("digits", [*keys, f"backend={name}"])
            runs.append(create_run(tmp_path / name, proof_recipe(recipe)))
            run_to_end(runs[-1], ranks, 3, children)
    assert compare(runs[1], runs[0], ranks=2, with_="ddp", limit=1e-5).passed
