"""L-BFGS: torch's own steps on the whole batch, whatever the ranks, and exact resumption."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.optimizers import LBFGS
from bigbatch.trainers.engine.closure import Closure
from bigbatch.trainers.engine.ddp import DdpEngine
from bigbatch.trainers.models.batch_stats import StepStatistics
from bigbatch.trainers.optim import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state_by_name,
    set_lr,
)
from tests.helpers import warm
from tests.helpers.ranks import run_ranks

MICRO, PARTS, STEPS = 6, 4, 5
CONFIG = LBFGS(name="lbfgs", lr=0.8, max_iter=3, history=4)


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step // 3)  # a batch comes three times
    x = torch.randn(MICRO * PARTS, 5, generator=generator, dtype=torch.float64)
    return x, torch.tanh(x @ torch.arange(5, dtype=torch.float64)[:, None])


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.BatchNorm1d(7) if norm else nn.Identity(), nn.Tanh()]
    return nn.Sequential(*layers, nn.Dropout(0.3 if norm else 0.0), nn.Linear(7, 1)).double()


def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def start(norm: bool) -> tuple[DdpEngine, StepStatistics, Closure]:
    engine = DdpEngine("fp32", "exact")
    model = network(norm)
    engine.prepare(model, build_optimizer(model, CONFIG), PARTS)
    statistics = StepStatistics(engine.module)
    return engine, statistics, Closure(engine, statistics, objective, PARTS)


def train(engine: DdpEngine, statistics: StepStatistics, closure: Closure, steps: range) -> None:
    """The loop's steps 1 to 3 with an optimizer that asks for closures."""
    mine = range(engine.rank, PARTS, engine.world)
    for step in steps:
        set_lr(engine.optimizer, 1.0 - 0.1 * step)
        x, y = (t.split(MICRO) for t in data(step))
        loss_sum = torch.zeros((), dtype=torch.float64)
        engine.zero_grad()
        statistics.begin()
        for i in mine:
            torch.manual_seed(100 * step + i)
            with engine.micro_batch(last=i == mine[-1]):
                loss = nn.functional.mse_loss(engine.model(x[i]), y[i])
                engine.backward(loss)
            closure.keep(100 * step + i, x[i], y[i])
            statistics.add()
            loss_sum += loss.detach()
        engine.reduce()
        total = engine.sum(torch.cat([loss_sum.view(1), statistics.local()]))
        statistics.finish(total[1:], PARTS)
        engine.step(closure.of_step(float(total[0]) / PARTS))
        closure.forget()


def weights(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.state_dict().values()]).tolist()


def test_one_rank_is_torchs_lbfgs_on_the_whole_batch() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=3, history_size=4, line_search_fn="strong_wolfe"
    )
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.8 * (1.0 - 0.1 * step)
        x, y = data(step)

        def closure(x: Any = x, y: Any = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    engine, statistics, ours = start(norm=False)
    train(engine, statistics, ours, range(STEPS))
    # The parameters come in another order, biases last: sums in flat vectors differ by rounding.
    assert weights(engine.module) == pytest.approx(weights(model), rel=1e-7, abs=1e-9)


def test_it_goes_on_bit_for_bit_from_its_state_by_name() -> None:
    whole = start(norm=True)
    train(*whole, range(STEPS))
    first = start(norm=True)
    train(*first, range(3))
    tensors, scalars = optimizer_state_by_name(first[0].optimizer, first[0].module)
    assert any(name.startswith("old_dirs[1]/") for name in tensors)
    second = start(norm=True)
    second[0].module.load_state_dict(first[0].module.state_dict())
    stored = {k: v.clone() for k, v in tensors.items()}
    load_optimizer_state(
        second[0].optimizer, second[0].module, stored, json.loads(json.dumps(scalars))
    )
    train(*second, range(3, STEPS))
    assert weights(second[0].module) == weights(whole[0].module)
    # BatchNorm counted each step once, not each evaluation.
    assert int(whole[0].module[1].num_batches_tracked) == STEPS  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_several_ranks_take_the_same_steps(world: int, tmp_path: Path) -> None:
    alone = start(norm=True)
    train(*alone, range(STEPS))
    run_ranks(world, Path(__file__), tmp_path)
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(world)]
    assert all(f == found[0] for f in found)
    assert found[0] == pytest.approx(weights(alone[0].module), rel=1e-9, abs=1e-12)


def test_weights_that_are_not_finite_stop_the_run() -> None:
    closure = start(norm=False)[2]
    closure.keep(0, torch.full((MICRO, 5), torch.inf).double(), torch.zeros(MICRO, 1).double())
    known = closure.of_step(1.0)
    assert known() == 1.0  # the loop's own evaluation, which it has checked
    with pytest.raises(UserError, match=r"line_search"):
        known()


@pytest.mark.parametrize(
    "change", ["clip={name: norm, limit: 1}", "precision=fp16", "optimizer.layer_decay=0.9"]
)
def test_what_does_not_go_with_it(change: str) -> None:
    lbfgs = "optimizer={name: lbfgs, lr: 1.0}"
    assert load_recipe("digits", [lbfgs]).optimizer.name == "lbfgs"
    with pytest.raises(UserError, match=r"lbfgs|L-BFGS"):
        load_recipe("digits", [lbfgs, change])


# Two decoding steps, a line search, and a rate that evaluations lower: all that has a past.
RUN = [
    *("optimizer={name: lbfgs, lr: 1.0, max_iter: 3, history: 3}", "data.image_size=16"),
    *("schedule={name: plateau, patience: 0, factor: 0.5, threshold: 0.3}", "data.workers=0"),
    *("duration=8 steps", "evaluate.every=1 steps", "checkpoint.every=3 steps", "log.wandb=off"),
    *("ensemble.soup=false", "global_batch=128", "augment.affine=null", "model.options={}"),
]


@pytest.mark.slow
def test_a_run_with_lbfgs_and_a_plateau_resumes_bit_for_bit(digits: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from bigbatch.configs.files import read_jsonl
    from bigbatch.configs.rundir import create_run
    from bigbatch.launcher.start import worker_command

    recipe = load_recipe("digits", [*RUN, f"data.path={digits}"])
    found = {}
    for name, stops in (("whole", [7]), ("parts", [4, 7])):
        run = create_run(tmp_path / name, recipe)
        for stop in stops:
            command = worker_command(run.path, stop)
            done = warm.run(command, cwd=tmp_path, capture_output=True)
            assert done.returncode == 0, done.stdout + done.stderr
        newest = max(run.checkpoints.glob("step-????????"))
        assert newest.name == "step-00000007"
        rates = [r["lr"] for r in read_jsonl(run.metrics) if r["kind"] == "train"]
        losses = [r["loss"] for r in read_jsonl(run.metrics) if r["kind"] == "train"]
        tensors = {
            file: load_file(newest / f"{file}.safetensors") for file in ("model", "optimizer")
        }
        found[name] = rates, losses, tensors
    assert found["whole"][:2] == found["parts"][:2]
    assert len(found["whole"][0]) == 7
    assert found["whole"][0][-1] < found["whole"][0][0]  # the plateau has acted
    for file, tensors in found["whole"][2].items():
        other = found["parts"][2][file]
        assert tensors.keys() == other.keys()
        assert all(torch.equal(tensors[name], other[name]) for name in tensors)


if __name__ == "__main__":
    parts = start(norm=True)
    train(*parts, range(STEPS))
    (Path(sys.argv[1]) / os.environ["RANK"]).write_text(json.dumps(weights(parts[0].module)))
    parts[0].close()
    sys.stdout.flush()
    os._exit(0)
