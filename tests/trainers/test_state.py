"""What changes in training beside the trained weights: agreed among ranks, or the run ends."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.prove import prove
from bigbatch.trainers import worker
from bigbatch.trainers.engine import open_engine

STEPS = 6


class Net(nn.Module):
    """A linear model that does something odd in its fourth pass, in training."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd, self.passes = odd, 0
        self.head, self.frozen = nn.Linear(64, 10), nn.Linear(10, 10)
        self.norm, self.other = nn.BatchNorm1d(64), nn.BatchNorm1d(64)
        self.frozen.requires_grad_(False)
        if odd == "spectral norm":
            self.head = nn.utils.parametrizations.spectral_norm(self.head)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)
        self.passes += self.training
        if self.passes == 4 and self.training:
            if self.odd == "wake up":
                self.frozen.requires_grad_(True)
            elif self.odd == "overflow":
                self.other(x.detach() * 1e30)  # its variance overflows, and nobody uses its output
        return self.head(self.norm(x)) + 0 * self.frozen(self.head(x))


def start(
    odd: str, digits: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: str
) -> tuple[int, RunDir]:
    monkeypatch.setattr("bigbatch.trainers.job.build_model", lambda *_, **__: Net(odd))
    settings = [
        *(f"data.path={digits}", "log.wandb=off", "data.workers=0", f"duration={STEPS} steps"),
        *("global_batch=32", "micro_batch=32", "schedule={name: constant}", "optimizer.lr=0.1"),
        *("checkpoint.every=2 steps", "evaluate.every=100 steps", *changes),
    ]
    run = create_run(folder / "run", load_recipe("digits", settings))
    return worker.main([str(run.path), "--stop-at", str(STEPS - 1)]), run


def events(run: RunDir) -> list[dict[str, Any]]:
    return list(read_jsonl(run.events)) if run.events.exists() else []


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ("wake up", "step 3: parameters of the model changed .*: frozen.weight woke up, frozen."),
        ("overflow", "step 3: loss .*, other.running_var not finite"),
        ("spectral norm", r"head.parametrizations.weight.0._u of the model \(_SpectralNorm\) ch"),
    ],
)
def test_what_ranks_cannot_agree_on_ends_the_run_by_name(
    odd: str,
    said: str,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    status, run = start(odd, digits, tmp_path, monkeypatch)
    assert status == 2
    assert re.search(said, capfd.readouterr().err)
    found = [e for e in events(run) if e["kind"] == "non_finite"]
    assert [e["buffers"] for e in found] == ([["other.running_var"]] if odd == "overflow" else [])
    saved = [path.name for path in run.checkpoints.glob("step-*")]
    assert saved == ([] if odd == "spectral norm" else ["step-00000002"])


def test_every_change_of_what_is_trained_is_seen() -> None:
    engine, model = open_engine("ddp", "fp32"), Net("nothing")
    engine.prepare(model, torch.optim.SGD(model.parameters(), 0.1), 1)
    bias = model.head.bias
    assert engine.changed_parameters() == []
    engine.refuse_changes(0, [], 0.0)
    model.head.requires_grad_(False)
    assert engine.changed_parameters() == ["head.weight froze", "head.bias froze"]
    model.head.requires_grad_(True)
    model.late = nn.Linear(3, 3)
    assert engine.changed_parameters() == ["late.weight is new", "late.bias is new"]
    model.late.requires_grad_(False)  # trained by nobody
    model.head.bias = nn.Parameter(bias.detach().clone())
    assert engine.changed_parameters() == ["head.bias was replaced"]
    model.head.bias = None
    assert engine.changed_parameters() == ["head.bias is gone"]
    model.head.bias = bias
    assert engine.changed_parameters() == []
    with pytest.raises(UserError, match=r"^step 7: .* on another rank; "):
        engine.refuse_changes(7, [], 1.0)


def test_a_step_that_spoils_running_statistics_is_stepped_over(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = ("recovery.max_rollbacks=1", "recovery.skip_steps=1")
    status, run = start("overflow", digits, tmp_path, monkeypatch, *back)
    assert status == 0
    (event,) = [e for e in events(run) if e["kind"] == "rollback"]
    assert (event["first"], event["last"]) == (3, 3)
    last = load_file(run.checkpoints / f"step-{STEPS - 1:08d}" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in last.values())
    assert last["norm.num_batches_tracked"] == STEPS - 2  # the step passed over counts nothing


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_regnet_with_evonorm_is_proven_on_two_ranks(digits: Path, tmp_path: Path) -> None:
    model = "model={name: regnetx_002, options: {norm_layer: evonormb0}}"
    recipe = load_recipe(
        "digits",
        [f"data.path={digits}", model, "global_batch=16", "micro_batch=4", "optimizer.lr=0.1"],
    )
    results = prove(recipe, tmp_path / "proof", steps=4, ranks=[1, 2], seed=0)
    assert all(result.passed for result in results), results
