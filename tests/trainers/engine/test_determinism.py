"""`determinism: full`: what it sets, what it refuses, and what it makes the same."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.identity import differences, recipe_hash
from bigbatch.configs.load import change_recipe, load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.start import agent_command
from bigbatch.trainers import worker
from bigbatch.trainers.engine import open_engine
from bigbatch.trainers.engine.determinism import choose_algorithms, without_form
from tests.helpers import warm

SMALL = (
    "model={name: test_resnet, options: {drop_rate: 0.2}}",
    "data={workers: 0, threads: 1, image_size: 16}",
    "log={wandb: off, diagnosis: false, ledger_every: 1}",
    "reduction=overlapped",
    "determinism=full",
    "duration=9 steps",
    "global_batch=24",
    "micro_batch=8",
    "schedule={name: constant}",
    "optimizer={name: sgd, lr: 0.1, momentum: 0.9}",
    "checkpoint={every: 4 steps, keep: 9}",
    "evaluate={every: 9 steps}",
)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    choose_algorithms(deterministic=False)


def settings() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_old_recipes_keep_their_hash_and_a_change_is_one() -> None:
    plain = load_recipe("digits")
    full = change_recipe(plain, ["determinism=full"])
    assert recipe_hash(change_recipe(full, ["determinism=none"])) == recipe_hash(plain)
    assert recipe_hash(full) != recipe_hash(plain)
    assert differences(plain, full) == ['determinism = "none" there, "full" here']


def test_an_engine_sets_what_its_recipe_asks_for() -> None:
    open_engine("ddp", "fp32", determinism="full")
    assert settings() == (True, True, False)
    open_engine("ddp", "fp32", "exact")
    assert settings() == (False, False, False)
    open_engine("ddp", "fp32")
    assert settings() == (False, False, True)


def test_the_workspace_of_cublas_is_set_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    choose_algorithms(deterministic=False)
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:0:0"):
        choose_algorithms(deterministic=True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    choose_algorithms(deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    choose_algorithms(deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_other_errors_are_none_of_determinism() -> None:
    refusal = RuntimeError("put_ does not have a deterministic implementation, but ...")
    assert without_form(refusal) is None  # nobody asked
    choose_algorithms(deterministic=True)
    assert "the operation put_ has no" in str(without_form(refusal))
    assert without_form(RuntimeError("CUDA error")) is None
    assert without_form(ValueError(str(refusal))) is None


class Unpooled(nn.Module):
    """Max-unpooling, which torch knows no deterministic form of, not even on a CPU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(self.unpool(*self.pool(x)))
        return out


def test_an_operation_without_a_deterministic_form_is_one_message(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import bigbatch.trainers.job as job

    build = job.build_model
    monkeypatch.setattr(job, "build_model", lambda *a, **k: Unpooled(build(*a, **k)))
    recipe = load_recipe("digits", [f"data.path={digits}", *SMALL])
    run = create_run(tmp_path / "run", recipe)
    assert worker.main([str(run.path)]) == 2
    said = [x for x in capsys.readouterr().err.splitlines() if "determin" in x]
    assert len(said) == 1
    assert "the operation max_unpooling2d_forward_out has no deterministic form" in said[0]
    assert not list(run.checkpoints.glob("*"))


def started(run: RunDir) -> dict[str, Any]:
    (event,) = [e for e in read_jsonl(run.events) if e["kind"] == "start"][:1]
    return event


def weights(run: RunDir, step: int) -> bytes:
    return (run.checkpoints / f"step-{step:08d}" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_three_overlapped_ranks_resume_to_the_same_bits(digits: Path, tmp_path: Path) -> None:
    """Where DDP changes its buckets after the first step, each start sums its first step otherwise
    (findings/torch-ddp-first-step.sh)."""
    recipe = load_recipe("digits", [f"data.path={digits}", *SMALL])
    runs = {}
    for name, stops in {"whole": (8,), "resumed": (4, 5, 8)}.items():
        runs[name] = create_run(tmp_path / name, recipe)
        for stop in stops:
            command = agent_command(runs[name].path, 3, stop_at=stop)
            done = warm.run(command, capture_output=True, timeout=280)
            assert done.returncode == 0, done.stderr
    whole, resumed = runs.values()
    assert started(whole)["deterministic"] is True
    lines = [
        [x for x in run.ledger.read_text().splitlines() if '"kind": "step"' in x]
        for run in (whole, resumed)
    ]
    assert len(lines[0]) == 8
    assert lines[0] == lines[1]
    assert weights(whole, 8) == weights(resumed, 8)
    first = read_jsonl(whole.ledger)[0]
    assert first["deterministic"] is True
