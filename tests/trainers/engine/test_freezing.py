"""Parts of a network that begin to learn later, against plain autograd, on every backend.

The ranks of one world size run all backends in one process group (`main`).
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bigbatch.configs.clipping import ClipNorm
from bigbatch.configs.optimizers import LAMB, SGD
from bigbatch.configs.regularise import SAM
from bigbatch.trainers.engine import open_engine
from bigbatch.trainers.engine.ddp import DdpEngine
from bigbatch.trainers.engine.freezing import Freezing
from bigbatch.trainers.engine.sharpness import Sharpness
from bigbatch.trainers.models.batch_stats import StepStatistics, recompute_statistics
from bigbatch.trainers.models.regularise import keep_within
from bigbatch.trainers.optim import build_optimizer
from bigbatch.trainers.optim.stages import NEVER, Learning, Stage, freeze
from bigbatch.trainers.recovery.checkpoint import (
    TrainState,
    capture,
    load_checkpoint,
    write,
)
from bigbatch.trainers.recovery.stored import Retention
from tests.helpers.ranks import run_ranks
from tests.trainers.engine.test_backends import MICRO_BATCHES, Net, draw

LR, MOMENTUM, DECAY, LIMIT = 0.1, 0.9, 1e-2, 0.5
OPTIMIZERS: dict[str, Any] = {
    "sgd": SGD(name="sgd", lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
    "lamb": LAMB(name="lamb", lr=0.02, weight_decay=DECAY),
}
STEPS = 6
PLACES = {"stem": NEVER, "blocks.0": 4.0, "blocks.1": 2.0, "head": 0.0}
BACKENDS = ("ddp", "zero1", "zero2", "fsdp2")


def begin_of(name: str) -> float:
    return next(start for place, start in PLACES.items() if name.startswith(f"{place}."))


def learning_of(model: nn.Module) -> Learning:
    names = [name for name, _ in model.named_parameters()]
    stages = [Stage(p, tuple(n for n in names if n.startswith(f"{p}."))) for p in PLACES]
    return Learning(tuple(stages), {name: begin_of(name) for name in names})


def model_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return Net().to(dtype)


class Run:
    """One rank's run, with the loop's own order of calls."""

    def __init__(
        self,
        backend: str,
        optimizer: str = "sgd",
        reduction: str = "overlapped",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.dtype = torch.float32 if backend.startswith("zero") else dtype
        model = model_of(self.dtype)  # DeepSpeed computes in float32 alone
        learning = learning_of(model)
        freeze(model, learning)
        self.engine = open_engine(backend, "fp32", reduction)
        found = build_optimizer(model, OPTIMIZERS[optimizer], learning)
        self.engine.prepare(model, found, MICRO_BATCHES)
        self.freezing = Freezing(learning, self.engine, found, self.engine.module)
        self.statistics = StepStatistics(self.engine.module)
        pieces = self.engine.pieces
        self.state = TrainState(0, model, found, self.engine.scaler, {}, pieces)
        self.norms: list[tuple[float, float]] = []

    def train(self, stop: int) -> None:
        engine = self.engine
        mine = range(engine.rank, MICRO_BATCHES, engine.world)
        engine.model.train()
        for step in range(self.state.step, stop):
            self.freezing.begin(step)
            engine.zero_grad()
            self.statistics.begin()
            for number in mine:
                x, y = draw(step, number, self.dtype)
                with engine.micro_batch(last=number == mine[-1]):
                    engine.backward(nn.functional.cross_entropy(engine.model(x), y))
                self.statistics.add()
            engine.reduce()
            assert engine.changed_parameters() == []
            total = engine.sum(self.statistics.local())
            micro_sq = float(engine.sum(engine.micro_batch_sq().view(1)))
            micro_sq /= engine.micro_batches_measured
            norm = engine.gradient_norm()
            self.statistics.finish(total, MICRO_BATCHES)
            engine.clip(ClipNorm(name="norm", limit=LIMIT), norm)
            engine.step()
            self.norms.append((float(norm), micro_sq))
            self.state.step = step + 1

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in capture(self.state).model.items()}


def reference(stop: int) -> tuple[dict[str, Tensor], list[tuple[float, list[float]]]]:
    """Plain autograd of the mean loss, SGD as its authors write it, BatchNorm by hand.

    Also the norm of the gradient, and the squared one of each micro-batch's, of what learns.
    """
    model = model_of()
    velocity: dict[str, Tensor] = {}
    norms = []
    for step in range(stop):
        learns = {n: p for n, p in model.named_parameters() if begin_of(n) <= step}
        model.train()
        for place in ("blocks.0", "blocks.1"):
            if PLACES[place] > step:
                model.get_submodule(place).eval()
        before = {n: b.clone() for n, b in model.named_buffers()}
        sums = {n: torch.zeros_like(b, dtype=torch.float64) for n, b in before.items()}
        gradients = {n: torch.zeros_like(p) for n, p in learns.items()}
        squares = []
        for number in range(MICRO_BATCHES):
            with torch.no_grad():
                for n, b in model.named_buffers():
                    b.copy_(before[n])
            x, y = draw(step, number, torch.float64)
            loss = nn.functional.cross_entropy(model(x), y)
            own = dict(zip(learns, torch.autograd.grad(loss, list(learns.values())), strict=True))
            squares.append(sum(float((g**2).sum()) for g in own.values()))
            for n, g in own.items():
                gradients[n] += g / MICRO_BATCHES
            for n, b in model.named_buffers():
                sums[n] += b / MICRO_BATCHES
        length = sum(float((g**2).sum()) for g in gradients.values()) ** 0.5
        norms.append((length, squares))
        with torch.no_grad():
            for n, b in model.named_buffers():
                counted = b.dtype == torch.int64
                b.copy_(before[n] + (b - before[n]).clamp(max=1) if counted else sums[n])
            for n, p in learns.items():
                plain = "norm" in n or n.endswith("bias")
                g = gradients[n] * min(1.0, LIMIT / (length + 1e-6))
                g = g if plain else g + DECAY * p
                velocity[n] = g if n not in velocity else MOMENTUM * velocity[n] + g
                p -= LR * velocity[n]
    return {n: t.clone() for n, t in model.state_dict().items()}, norms


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("reduction", ["overlapped", "exact"])
def test_one_rank_against_plain_autograd(reduction: str) -> None:
    run = Run("ddp", reduction=reduction)
    initial = run.weights()
    for stop in range(1, STEPS + 1):
        run.train(stop)
        expected, norms = reference(stop)
        found = run.weights()
        assert_close(found, expected)
        length, squares = norms[-1]
        measured = squares if reduction == "exact" else squares[:1]  # as docs/advise.md says
        torch.testing.assert_close(run.norms[-1], (length, sum(measured) / len(measured)))
        for name, value in found.items():
            if begin_of(name) >= stop:  # statistics and counters of BatchNorm too, bit for bit
                assert torch.equal(value, initial[name]), (name, stop)
    stateful = {id(p) for p in run.state.optimizer.state}
    trained = {n for n, p in run.state.model.named_parameters() if id(p) in stateful}
    assert trained == {n for n, _ in run.state.model.named_parameters() if begin_of(n) < NEVER}


def test_no_gradient_is_computed_of_what_is_frozen_where_no_rank_waits_for_it() -> None:
    run = Run("ddp")
    run.train(1)
    taken = {n for n, p in run.engine.module.named_parameters() if p.grad is not None}
    assert taken == {"head.weight", "head.bias"}
    assert set(run.engine.layer_gradient_norms()) == {"head.weight"}
    run.train(5)
    taken = {n for n, p in run.engine.module.named_parameters() if p.grad is not None}
    assert "blocks.0.conv.weight" in taken
    assert "stem.weight" not in taken
    norms = run.engine.layer_gradient_norms()
    run.engine.frozen = frozenset({"blocks.0.conv.weight"})  # where ranks wait for it, it has a 0
    assert norms.keys() - run.engine.layer_gradient_norms().keys() == run.engine.frozen


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, optimizer: str, at: int) -> None:
    straight, first, second = (Run("ddp", optimizer, "exact") for _ in range(3))
    straight.train(STEPS)
    first.train(at)
    load_checkpoint(write(tmp_path, capture(first.state), Retention()), second.state)
    assert second.state.step == at
    second.train(STEPS)
    for name, value in straight.weights().items():
        assert torch.equal(second.weights()[name], value), name


def test_evaluation_in_between_and_going_back_change_nothing(tmp_path: Path) -> None:
    """As after a rollback: a step that was frozen once is frozen again."""
    straight, other = Run("ddp"), Run("ddp")
    straight.train(STEPS)
    other.train(1)
    path = write(tmp_path, capture(other.state), Retention())
    other.train(5)
    other.engine.module.eval()
    other.engine.module.train()
    load_checkpoint(path, other.state)
    other.train(STEPS)
    for name, value in straight.weights().items():
        assert torch.equal(other.weights()[name], value), name


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_statistics_made_anew_are_of_what_has_trained(backend: str) -> None:
    """What waits trains and is evaluated by the statistics that it started from."""
    run = Run(backend)
    images = draw(0, 0, run.dtype)[0]
    trained = {2: set(), 3: {"blocks.1"}, 4: {"blocks.1"}, 5: {"blocks.0", "blocks.1"}}
    for step, expected in trained.items():
        run.train(step)
        with run.engine.full_model() as model:
            run.freezing.keep_statistics(model, step)
            before = {n: b.clone() for n, b in model.named_buffers()}
            recompute_statistics(model, [images], 1, lambda total: total)
            changed = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
        assert {name[: len("blocks.0")] for name in changed} == expected


def test_gradients_are_held_back_where_they_cross_ranks() -> None:
    """The way of DDP, ZeRO and FSDP2, here with nobody to send them to."""
    model = model_of()
    engine = DdpEngine("fp32", "overlapped")
    engine.prepare(model, build_optimizer(model, OPTIMIZERS["sgd"]), 1)
    engine.model = engine._wrapped = nn.Sequential(model)  # as by DDP
    for frozen in ({"stem.weight", "head.bias"}, {"stem.weight"}, set[str]()):
        engine.freeze(frozen)
        engine.zero_grad()
        x, y = draw(0, 0, torch.float64)
        with engine.micro_batch(last=True):
            engine.backward(nn.functional.cross_entropy(engine.model(x), y))
        still = {n for n, p in model.named_parameters() if not p.grad.any()}
        assert still - {"stem.bias"} == frozen
        own = dict(model.named_parameters())  # SAM asks for gradients in another way
        loss = nn.functional.cross_entropy(engine.model(x), y)
        taken = torch.autograd.grad(loss, list(own.values()))
        still = {n for n, g in zip(own, taken, strict=True) if not g.any()}
        assert still - {"stem.bias"} == frozen


def test_sharpness_and_max_norm_leave_what_waits_alone() -> None:
    run = Run("ddp")
    keep_within(run.state.optimizer, run.engine.module, 1e-3)
    before = {n: p.detach().clone() for n, p in run.engine.module.named_parameters()}
    run.freezing.begin(0)
    sharpness = Sharpness(SAM(name="sam", rho=0.3), run.engine.module)
    x, y = draw(0, 0, torch.float64)
    sharpness.climb(nn.functional.cross_entropy(run.engine.module(x), y))
    moved = {n for n, p in run.engine.module.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"head.weight", "head.bias"}
    sharpness.descend()
    run.freezing.begin(4)  # after which SAM climbs by what has begun since
    sharpness.climb(nn.functional.cross_entropy(run.engine.module(x), y))
    moved = {n for n, p in run.engine.module.named_parameters() if not torch.equal(p, before[n])}
    assert "blocks.0.conv.weight" in moved
    assert "stem.weight" not in moved


def main() -> None:
    """One rank: every backend goes on from a checkpoint of one rank, at the step of a stage."""
    folder, world = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    for backend in BACKENDS:
        for optimizer in OPTIMIZERS:
            for start in (0, 2):
                run = Run(backend, optimizer)
                single = "-float32" if backend.startswith("zero") else ""
                if start:
                    load_checkpoint(
                        folder / f"{optimizer}{single}" / f"step-{start:08d}", run.state
                    )
                run.train(STEPS)
                weights, name = run.weights(), f"{world}-{backend}-{optimizer}-{start}"
                if os.environ["RANK"] == "0":
                    norms = torch.tensor(run.norms, dtype=torch.float64)
                    save_file({**weights, "norms": norms}, folder / f"{name}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_every_backend_goes_on_at_the_step_at_which_a_stage_begins(
    tmp_path: Path, world: int
) -> None:
    expected = {}
    for optimizer in OPTIMIZERS:
        run = Run("ddp", optimizer)
        run.train(2)
        write(tmp_path / optimizer, capture(run.state), Retention())
        half = Run("ddp", optimizer, dtype=torch.float32)
        half.train(2)
        write(tmp_path / f"{optimizer}-float32", capture(half.state), Retention())
        run.train(STEPS)
        expected[optimizer] = run
    run_ranks(world, Path(__file__), tmp_path, str(world))
    for optimizer, run in expected.items():
        for start in (0, 2):
            for backend in BACKENDS:
                file = tmp_path / f"{world}-{backend}-{optimizer}-{start}.safetensors"
                found = load_file(file)
                norms = found.pop("norms")
                single = backend.startswith("zero")
                rtol, atol = (2e-4, 2e-6) if single else (1e-9, 1e-11)
                for key, value in run.weights().items():
                    its = found[key].to(value)
                    where = f"{file.name} {key}"
                    torch.testing.assert_close(its, value, rtol=rtol, atol=atol, msg=where)
                    if begin_of(key) == NEVER:
                        assert torch.equal(its, value.to(found[key]).to(value)), where
                known = torch.tensor(run.norms[start:], dtype=torch.float64)
                torch.testing.assert_close(norms[:, 0], known[:, 0], rtol=1e-5, atol=0)
                if backend == "ddp":
                    own = norms[:, 1]
                elif single:  # each rank's first micro-batch, without what is held back
                    torch.testing.assert_close(norms[:, 1], own, rtol=1e-4, atol=0)


if __name__ == "__main__":
    main()
