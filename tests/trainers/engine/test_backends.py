"""Every backend gives the weights of one rank: real gloo processes, real DeepSpeed, real FSDP2.

The ranks of one world size run all its cases in one process group (`main`).
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from bigbatch.configs.clipping import ClipNorm
from bigbatch.configs.optimizers import LAMB, LARS, SGD, AdamW, Lion, Muon
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.ledger.digest import from_limbs, to_limbs
from bigbatch.trainers.ledger.multipliers import MASK, digest_bytes, digest_value
from bigbatch.trainers.ledger.state import StateDigests
from bigbatch.trainers.models.batch_stats import StepStatistics
from bigbatch.trainers.optim import build_optimizer, trust_ratios
from bigbatch.trainers.optim.averaging import WeightAverage
from bigbatch.trainers.recovery.checkpoint import (
    TrainState,
    capture,
    gather,
    load_checkpoint,
    write,
)
from bigbatch.trainers.recovery.stored import AVERAGE, MODEL, OPTIMIZER, Retention
from tests.helpers.ranks import run_ranks

MICRO_BATCHES, MICRO = 4, 8
OPTIMIZERS = {
    "lars": LARS(name="lars", lr=1.0, weight_decay=1e-3, trust_coefficient=0.02),
    "lamb": LAMB(name="lamb", lr=0.01, weight_decay=1e-2),
    "sgd": SGD(name="sgd", lr=0.1, weight_decay=1e-3, nesterov=True),
    "adamw": AdamW(name="adamw", lr=0.01, weight_decay=0.05),
    "lion": Lion(name="lion", lr=0.001, weight_decay=0.05),
    "muon": Muon(name="muon", lr=0.02, weight_decay=0.05),
    "muon_lamb": Muon(name="muon", lr=0.02, rest=LAMB(name="lamb", lr=0.01, weight_decay=0.01)),
}
SHARDED = ["zero1", "zero2", "fsdp2"]


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Convolutions, BatchNorm and a linear layer, of sizes that no world size divides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, stride=2)
        self.blocks = nn.Sequential(Block(7), Block(7))
        self.head = nn.Linear(7 * 9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).flatten(1))


def draw(step: int, number: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + number)
    x = torch.randn(MICRO, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = x.mean((2, 3)).repeat(1, 2)[:, :5].argmax(1)
    return x.to(dtype), y


def build(case: dict[str, Any]) -> tuple[Engine, TrainState]:
    engine = open_engine(case["backend"], "fp32")
    torch.manual_seed(3)
    model = Net().to(getattr(torch, case.get("dtype", "float32")))
    if case["optimizer"] == "timm":
        from timm.optim import Lars

        optimizer = Lars(model.parameters(), lr=1.0, weight_decay=1e-3, trust_coeff=0.02)
    elif case["optimizer"] == "timm_muon":
        from timm.optim import Muon as TimmMuon

        optimizer = TimmMuon(model.parameters(), lr=0.02)
    else:
        optimizer = build_optimizer(model, OPTIMIZERS[case["optimizer"]])
    if case.get("scaled"):  # as under fp16; a power of two, so that it costs no digit
        engine.accelerator.scaler = ShardedGradScaler("cpu", init_scale=2.0**10)
    counts = [int(digit) for digit in case.get("changing", "")]
    total = math.gcd(*counts) if counts else case.get("micro_batches", MICRO_BATCHES)
    engine.prepare(model, optimizer, total)
    average = WeightAverage(engine.own_weights(), range(3, 99), 0.1)
    return engine, TrainState(
        0, model, optimizer, engine.scaler, {}, engine.pieces, average=average
    )


def train(
    engine: Engine,
    state: TrainState,
    stop: int,
    statistics: StepStatistics,
    clip: float | None = None,
    overflow: int | None = None,
    changing: str = "",
) -> list[list[float]]:
    """The loop's own order of calls; (gradient norm, micro-batch norm) of each step.

    In step `overflow` the last micro-batch's loss is infinite, on the rank that has it. `changing`
    are numbers of micro-batches, which steps have in turn; some may leave a rank without one.
    """
    dtype = next(engine.module.parameters()).dtype
    counts = [int(digit) for digit in changing] or [engine.micro_batches]
    found = []
    engine.model.train()
    for step in range(state.step, stop):
        total = counts[step % len(counts)]
        mine = range(engine.rank, total, engine.world)
        engine.begin(total)
        statistics.begin()
        for number in mine:
            x, y = draw(step, number, dtype)
            with engine.micro_batch(last=number == mine[-1]):
                loss = nn.functional.cross_entropy(engine.model(x), y)
                bad = step == overflow and number == total - 1
                engine.backward(loss * math.inf if bad else loss)
            statistics.add()
        engine.reduce()
        assert engine.changed_parameters() == []
        totals = engine.sum(torch.cat([engine.micro_batch_sq().view(1), statistics.local()]))
        norm = engine.gradient_norm()
        assert math.isfinite(norm) == (step != overflow)
        if step == overflow:
            statistics.discard()
            if engine.scaler is not None:
                engine.step()  # which skips, on every rank, and halves the scale
                assert engine.scaler.get_scale() == 2.0**9
        else:
            statistics.finish(totals[1:], total)
            if clip is not None:
                engine.clip(ClipNorm(name="norm", limit=clip), norm)
            engine.step()
            state.average.update(step + 1)
        found.append([float(norm), float(totals[0]) / engine.micro_batches_measured])
    state.step = stop
    return found


def whole(engine: Engine, state: TrainState) -> dict[str, torch.Tensor]:
    """Weights, optimizer state and average, whole, by name; on rank 0 (elsewhere weights alone)."""
    captured = capture(state)
    found = captured.model | {f"state/{k}": v for k, v in captured.optimizer.items()}
    return found | {f"average/{k}": v for k, v in captured.average.items()}


def check_average(engine: Engine, state: TrainState, wholes: dict[str, torch.Tensor]) -> None:
    """Of a rank's pieces there is an average of the same size, and none of anything else."""
    held = {name: mean.shape for name, mean in state.average.tensors.items()}
    assert held == {name: piece.shape for name, piece in engine.own_weights().items()}
    count = sum(mean.numel() for mean in state.average.tensors.values())
    sizes = [(p.numel(), p[0].numel()) for p in Net().parameters()]
    total, rows = (sum(column) for column in zip(*sizes, strict=True))
    whole_rows = -(-total // engine.world) + rows  # FSDP2 cuts between rows, of each parameter
    assert count == total if engine.pieces is None else count <= whole_rows < total
    for name, value in engine.whole(state.average.averaged()).items():
        assert value.dtype == next(engine.module.parameters()).dtype
        if engine.rank == 0:
            assert torch.equal(value, wholes[f"average/{name}"].to(value)), name


def check_digests(engine: Engine, state: TrainState) -> None:
    """Digests of ranks' pieces add up to those of the whole tensors that a checkpoint stores."""
    captured = capture(state)
    own = StateDigests(engine)
    found = torch.stack([own.weights(), own.buffers(), own.optimizer()])
    model, optimizer = from_limbs(engine.sum(to_limbs(found[1:]).flatten()).tolist())
    (weights,) = from_limbs(engine.sum(to_limbs(found[:1]).flatten()).tolist())
    copies = engine.gather_values((own.copies().tolist(), own.each_copy()))
    assert copies == [copies[0]] * engine.world  # on whatever backend
    if engine.rank:
        return
    scalars: Any = captured.content["optimizer"]
    values = sum(digest_value(name, json.dumps(value)) for name, value in scalars.items())
    assert (weights + model) & MASK == digest_files(captured.model)
    assert optimizer == (digest_files(captured.optimizer) + values) & MASK


def digest_files(tensors: dict[str, torch.Tensor]) -> int:
    found = (
        digest_bytes(n, t.reshape(-1).view(torch.uint8).numpy().data, t.element_size(), t.shape)
        for n, t in tensors.items()
    )
    return sum(found) & MASK


def run(case: dict[str, Any], steps: list[int]) -> dict[str, Any]:
    """{"STEP/NAME": tensor} and trust ratios after each of `steps`, and the norms on the way."""
    engine, state = build(case)
    statistics = StepStatistics(engine.module)
    tensors, norms, trust = {}, [], {}
    names = engine.module if engine.pieces is None else engine.pieces.names
    for stop in steps:
        norms += train(
            engine,
            state,
            stop,
            statistics,
            case.get("clip"),
            case.get("overflow"),
            case.get("changing", ""),
        )
        trust[str(stop)] = trust_ratios(engine.optimizer, names)
        tensors |= {f"{stop}/{k}": v.clone() for k, v in whole(engine, state).items()}
    check_average(engine, state, whole(engine, state))
    check_digests(engine, state)
    with engine.full_model() as model:
        for name, value in model.state_dict().items():
            assert torch.equal(value, tensors[f"{steps[-1]}/{name}"]), name
    return {"tensors": tensors, "norms": norms, "trust": trust}


def launch(folder: Path, world: int, jobs: list[dict[str, Any]]) -> None:
    """Run jobs, one after the other, in one process group of `world` ranks."""
    (folder / f"jobs-{world}.json").write_text(json.dumps(jobs))
    run_ranks(world, Path(__file__), folder, str(world))


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(v) for v in case.values())


def main() -> None:
    """One rank of `launch`."""
    folder, world = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    for job in json.loads((folder / f"jobs-{world}.json").read_text()):
        if job["kind"] == "compare":
            result = run(job["case"], job["steps"])
            if os.environ["RANK"] == "0":
                stem = folder / f"{world}-{name_of(job['case'])}"
                save_file(result.pop("tensors"), f"{stem}.safetensors")
                Path(f"{stem}.json").write_text(json.dumps(result))
        else:
            go_on(folder, job)
    torch.distributed.barrier()  # leave together
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def go_on(folder: Path, job: dict[str, Any]) -> None:
    """Resume from `folder`'s newest checkpoint, train to `stop`, save."""
    engine, state = build(job["case"])
    if job["start"]:
        load_checkpoint(folder / f"step-{job['start']:08d}", state)
        assert state.step == job["start"]
    train(engine, state, job["stop"], StepStatistics(engine.module))
    if engine.rank == 0:
        captured = capture(state)
        write(folder, captured, Retention())
    else:
        gather(state)
    engine.barrier()


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], step: int) -> float:
    """The largest |a - b| of a tensor relative to the norm of the tensor."""
    worst = 0.0
    chosen = {k for k in a if k.startswith(f"{step}/")}
    assert chosen == {k for k in b if k.startswith(f"{step}/")}
    for name in chosen:
        assert a[name].dtype == b[name].dtype
        x, y = a[name].double(), b[name].double()
        scale = float(y.norm())
        worst = max(worst, float((x - y).norm()) / scale if scale else float((x - y).norm()))
    return worst


def compare(backend: str, optimizer: str, dtype: str = "float32", *steps: int) -> dict[str, Any]:
    case = {"backend": backend, "optimizer": optimizer, "dtype": dtype}
    return {"kind": "compare", "case": case, "steps": list(steps or (10,))}


def scaled(backend: str, micro_batches: int = MICRO_BATCHES) -> dict[str, Any]:
    """With a loss scale, a step that overflows on one rank, and clipping."""
    job = compare(backend, "lamb")
    job["case"] |= {"clip": 1.5, "overflow": 3, "micro_batches": micro_batches, "scaled": True}
    return job


def changing(backend: str, counts: str) -> dict[str, Any]:
    """Steps of other numbers of micro-batches than the one before."""
    job = compare(backend, "lamb")
    job["case"] |= {"changing": counts}
    return job


def go_on_job(backend: str, start: int, stop: int) -> dict[str, Any]:
    case = {"backend": backend, "optimizer": "lamb", "dtype": "float32"}
    return {"kind": "go on", "case": case, "start": start, "stop": stop}


LAYERWISE = ("lars", "lamb")
MUON = ("muon", "muon_lamb")
ADAPTED = {"stem.weight", "blocks.0.conv.weight", "blocks.1.conv.weight", "head.weight"}
ADAPTED_BY = dict.fromkeys(LAYERWISE, ADAPTED) | {"muon_lamb": {"head.weight"}}
# Two ranks share four micro-batches evenly, and three do not.
JOBS = [
    go_on_job("zero1", 4, 7),
    go_on_job("fsdp2", 7, 10),
    compare("ddp", "lars"),
    *(compare(b, o) for b in SHARDED for o in LAYERWISE),
    *(scaled(b, micro_batches=3) for b in SHARDED),
    changing("ddp", "1341"),
    *(changing(b, "243") for b in SHARDED),
    compare("fsdp2", "lars", "float64"),
    *(compare(b, "muon_lamb") for b in ("ddp", "zero1", "fsdp2")),
    compare("zero1", "timm"),
    compare("zero1", "timm_muon"),
]
# Fifty steps, after which rounding has grown a hundredfold, on three ranks alone: what could grow
# otherwise, an exchange or a piece that is another rank's, is off in the first ten.
MORE_JOBS = {
    2: [
        *(compare(b, o) for b in SHARDED for o in ("sgd", "adamw", "lion")),
        *(compare(b, o, "float64") for b in ("ddp", "fsdp2") for o in (*LAYERWISE, *MUON)),
        *(compare(b, o) for b in ["ddp", *SHARDED] for o in MUON),
    ],
    3: [
        *(compare(b, o, "float32", 10, 50) for b in ["ddp", *SHARDED] for o in (*LAYERWISE, *MUON)),
        *(scaled(b) for b in SHARDED),
        changing("ddp", "6112"),  # the larger first: DDP settles its buckets in step 0
        *(changing(b, "364") for b in SHARDED),
    ],
    4: [compare(b, o) for b in ["ddp", *SHARDED] for o in (*LAYERWISE, *MUON)],
}


def cases(jobs: dict[int, list[dict[str, Any]]]) -> Any:
    found = [
        (world, job)
        for world, those in jobs.items()
        for job in those
        if job["kind"] == "compare" and not job["case"]["optimizer"].startswith("timm")
    ]
    ids = [f"{world}-{name_of(job['case'])}" for world, job in found]
    return pytest.mark.parametrize(("world", "job"), found, ids=ids)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all JOBS have left their weights; the moves start with four steps on one rank."""
    folder = tmp_path_factory.mktemp("two")
    go_on(folder, go_on_job("ddp", 0, 4))
    launch(folder, 2, JOBS)
    return folder


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for MORE_JOBS; the moves start on four ranks."""
    folder = tmp_path_factory.mktemp("more")
    launch(folder, 4, [go_on_job("ddp", 0, 4), *MORE_JOBS[4]])
    launch(folder, 2, [go_on_job("zero1", 4, 7), *MORE_JOBS[2]])
    launch(folder, 3, [go_on_job("fsdp2", 7, 10), *MORE_JOBS[3]])
    return folder


@pytest.fixture(scope="module")
def one_rank() -> Any:
    """What one rank gives, made once for each kind of case."""
    made: dict[str, dict[str, Any]] = {}

    def get(job: dict[str, Any]) -> dict[str, Any]:
        case = job["case"] | {"backend": "ddp"}
        case.pop("scaled", None)
        key = f"{name_of(case)} {job['steps']}"
        if key not in made:
            made[key] = run(case, job["steps"])
        return made[key]

    return get


def check(folder: Path, world: int, job: dict[str, Any], one_rank: Any) -> None:
    expected, stem = one_rank(job), folder / f"{world}-{name_of(job['case'])}"
    tensors = load_file(f"{stem}.safetensors")
    double = job["case"]["dtype"] == "float64"
    for step in job["steps"]:
        limit = 1e-10 if double else {10: 1e-5, 50: 1e-3}[step]
        found = difference(tensors, expected["tensors"], step)
        print(f"{world} ranks, {name_of(job['case'])}, {step} steps: {found:.1e}")  # see docs
        assert found <= limit
    figures = json.loads(Path(f"{stem}.json").read_text())
    for step in map(str, job["steps"]):
        ratios = figures["trust"][step]
        assert set(ratios) == ADAPTED_BY.get(job["case"]["optimizer"], set())
        assert ratios == pytest.approx(expected["trust"][step], rel=10 * limit)
    norms = figures["norms"]
    for (norm, _), (expected_norm, _) in zip(norms[:10], expected["norms"], strict=False):
        assert norm == pytest.approx(expected_norm, rel=1e-4, nan_ok=True)
    if not double:  # which FSDP2 scales on the way, to no use of ours
        assert norms[0][1] == pytest.approx(first_micro_batches(job, world), rel=1e-4)


def first_micro_batches(job: dict[str, Any], world: int) -> float:
    """The mean squared gradient norm of the micro-batches that each rank has first."""
    _, state = build(job["case"] | {"backend": "ddp", "scaled": False})
    found = []
    ranks = min(world, int(job["case"].get("changing", "9")[0]))  # the others have none
    for number in range(ranks):
        state.model.zero_grad()
        x, y = draw(0, number, torch.float32)
        nn.functional.cross_entropy(state.model(x), y).backward()
        found.append(sum(float(p.grad.square().sum()) for p in state.model.parameters()))
    return sum(found) / ranks


@cases({2: JOBS})
def test_two_ranks_give_the_weights_of_one(two, one_rank, world, job):
    check(two, world, job, one_rank)


@pytest.mark.parametrize("optimizer", ["timm", "timm_muon"])
def test_an_optimizer_that_takes_a_piece_for_a_layer_is_found_out(two, one_rank, optimizer):
    """timm's Lars and Muon under ZeRO-1: the check that ours pass is one that can fail."""
    job = compare("zero1", optimizer)
    tensors = load_file(two / f"2-{name_of(job['case'])}.safetensors")
    # Of Muon the weights alone: timm's takes flat pieces for biases, and steps them by AdamW.
    found, expected = (
        {k: v for k, v in those.items() if "/state/" not in k}
        for those in (tensors, one_rank(job)["tensors"])
    )
    assert difference(found, expected, 10) > 1e-3


def test_a_run_moves_between_backends(two, one_rank):
    """One rank, then ZeRO-1, then FSDP2 on two: the weights and the state of one rank."""
    check_moved(two, one_rank)


@pytest.mark.slow
@cases(MORE_JOBS)
def test_more_ranks_and_optimizers_give_the_weights_of_one(more, one_rank, world, job):
    check(more, world, job, one_rank)


@pytest.mark.slow
def test_a_run_moves_between_backends_and_world_sizes(more, one_rank):
    """DDP on four ranks, ZeRO-1 on two, FSDP2 on three."""
    check_moved(more, one_rank)


def check_moved(folder: Path, one_rank: Any) -> None:
    undisturbed = one_rank(compare("ddp", "lamb"))["tensors"]
    moved = folder / "step-00000010"
    found = {f"10/{k}": v for k, v in load_file(moved / MODEL).items()}
    found |= {f"10/state/{k}": v for k, v in load_file(moved / OPTIMIZER).items()}
    found |= {f"10/average/{k}": v for k, v in load_file(moved / AVERAGE).items()}
    assert difference(found, undisturbed, 10) <= 1e-5


if __name__ == "__main__":
    main()
