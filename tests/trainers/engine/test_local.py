"""Rounds of post-local SGD against the algorithm written out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigbatch.configs.clipping import Clip, ClipNorm
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.optimizers import SGD
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.trainers import worker
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.optim import build_optimizer
from bigbatch.trainers.replay import __main__ as replay
from tests.trainers.engine.test_backends import Net, draw

WORKERS, EACH, EVERY = 4, 2, 3
LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-2


def model_of() -> nn.Module:
    torch.manual_seed(3)
    return Net().double()


def gradients(model: nn.Module, places: list[tuple[int, int]]) -> list[Tensor]:
    """The mean gradient of micro-batches."""
    model.zero_grad()
    for step, number in places:
        x, y = draw(step, number, torch.float64)
        (nn.functional.cross_entropy(model(x), y) / len(places)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def updated(
    weights: list[Tensor],
    momenta: list[Tensor],
    grads: list[Tensor],
    decay: list[float],
    limit: float,
) -> None:
    """torch's SGD with Nesterov momentum, in place."""
    norm = torch.cat([g.flatten() for g in grads]).norm()
    share = min(1.0, limit / (float(norm) + 1e-6))
    for w, m, g, d in zip(weights, momenta, grads, decay, strict=True):
        g = g * share + d * w
        m.mul_(MOMENTUM).add_(g)
        w.sub_(LR * (g + MOMENTUM * m))


def by_hand(rounds: int, limit: float) -> tuple[list[Tensor], list[Tensor]]:
    """Two ordinary steps, then rounds: each worker alone, and the mean of what they have."""
    model = model_of()
    parameters = list(model.parameters())
    decay = [DECAY if p.ndim > 1 else 0.0 for p in parameters]
    weights = [p.detach().clone() for p in parameters]
    momenta = [torch.zeros_like(w) for w in weights]

    def be(own: list[Tensor]) -> None:
        with torch.no_grad():
            for p, w in zip(parameters, own, strict=True):
                p.copy_(w)

    for step in range(2):
        be(weights)
        grads = gradients(model, [(step, i) for i in range(WORKERS * EACH)])
        updated(weights, momenta, grads, decay, limit)
    for step in range(2, 2 + rounds):
        ends = []
        for number in range(WORKERS):
            own, m = [w.clone() for w in weights], [m.clone() for m in momenta]
            for update in range(EVERY):
                first = update * WORKERS * EACH + number
                be(own)
                grads = gradients(model, [(step, first + WORKERS * j) for j in range(EACH)])
                updated(own, m, grads, decay, limit)
            ends.append((own, m))
        weights = [
            torch.stack(each).mean(0) for each in zip(*(own for own, _ in ends), strict=True)
        ]
        momenta = [torch.stack(each).mean(0) for each in zip(*(m for _, m in ends), strict=True)]
    return weights, momenta


def engine_step(engine: Engine, step: int, count: int, clip: Clip | None) -> Tensor:
    """What the loop does in a step; its gradient's norm."""
    engine.begin(count)
    for number in range(count):
        x, y = draw(step, number, torch.float64)
        with engine.micro_batch(last=number == count - 1):
            engine.backward(nn.functional.cross_entropy(engine.model(x), y))
    engine.reduce()
    norm = engine.gradient_norm()
    if clip is not None:
        engine.clip(clip, norm)
    return norm


@pytest.mark.parametrize("limit", [1e9, 0.5])
def test_a_round_is_the_algorithm_written_out(limit: float) -> None:
    clip = ClipNorm(name="norm", limit=limit)
    config = SGD(name="sgd", lr=LR, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
    engine = open_engine("ddp", "fp32", "exact")
    try:
        model = model_of()
        optimizer = build_optimizer(model, config)
        engine.prepare(model, optimizer, WORKERS * EACH)
        engine.train_apart(WORKERS, EACH, clip)
        one, whole = WORKERS * EACH, WORKERS * EACH * EVERY
        for step, count in enumerate((one, one, whole, whole, whole)):
            before = [p.detach().clone() for p in model.parameters()]
            norm = engine_step(engine, step, count, clip)
            assert engine.in_round == (step > 1)
            # Until the step is taken nothing has changed, and skipped it leaves no trace.
            assert all(map(torch.equal, before, model.parameters()))
            if step == 3:
                engine.skip()
                assert torch.equal(norm, engine_step(engine, step, count, clip))
            engine.step()
            if step > 1:
                moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
                assert norm == pytest.approx(float(torch.cat([m.flatten() for m in moved]).norm()))
        weights, momenta = by_hand(3, limit)
        for p, w, m in zip(model.parameters(), weights, momenta, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-12)
            buffer = optimizer.state[p]["momentum_buffer"]
            torch.testing.assert_close(buffer, m, rtol=1e-10, atol=1e-12)
    finally:
        engine.close()


RUN = (
    "model={name: test_resnet, options: {drop_rate: 0.2}}",
    "data={workers: 0, threads: 1, image_size: 16}",
    "log={wandb: off, tensorboard: false, every: 1, ledger_every: 1}",
    "duration=700 samples",
    "global_batch={name: post_local, batch: 64, workers: 2, every: 3, start: 100 samples}",
    "micro_batch=16",
    "schedule={name: cosine, warmup: 0 samples}",
    "optimizer={name: sgd, lr: 0.1, momentum: 0.9}",
    "checkpoint={every: 1 steps, keep: 9}",
    "evaluate.precise_bn_images=64",
    "ensemble.soup=false",
)


def small(digits: Path, *changes: str) -> Any:
    return load_recipe("digits", [f"data.path={digits}", *RUN, *changes], say=None)


def test_a_run_goes_on_between_rounds_bit_for_bit(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigbatch.trainers.finish.say_results", lambda *_: [])  # takes seconds
    runs: list[RunDir] = []
    for name, stops in (("whole", []), ("parts", ["1", "3"])):
        runs.append(create_run(tmp_path / name, small(digits)))
        for stop in stops:
            assert worker.main([str(runs[-1].path), "--stop-at", stop]) == 0
        assert worker.main([str(runs[-1].path)]) == 0
    for file in ("model", "optimizer"):
        one, two = (r.checkpoints / f"step-00000005/{file}.safetensors" for r in runs)
        assert one.read_bytes() == two.read_bytes()
    records = [[r for r in read_jsonl(r.metrics) if r["kind"] == "train"] for r in runs]
    assert [r["global_batch"] for r in records[0]] == [64, 64, 192, 192, 192]
    assert [r["loss"] for r in records[0]] == [r["loss"] for r in records[1]]
    lines = [[x for x in read_jsonl(r.ledger) if x["kind"] == "step"] for r in runs]
    assert json.dumps(lines[0]) == json.dumps(lines[1])


@pytest.mark.slow
def test_rounds_come_out_again_and_are_not_taken_apart(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("bigbatch.trainers.finish.say_results", lambda *_: [])
    run = create_run(tmp_path / "r", small(digits, "checkpoint.every=2 steps"))
    assert worker.main([str(run.path)]) == 0
    assert replay.main(["audit", str(run.path), "--fraction", "1", "--seed", "0"]) == 0
    assert "recomputed steps 3 to 4: the same, bit for bit" in capsys.readouterr().out
    assert replay.main(["step", str(run.path), "--step", "4"]) == 2
    assert "step 4 is a round of global_batch post_local" in capsys.readouterr().err
