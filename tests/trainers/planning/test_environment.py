"""What the environment says decides no weight: it is pinned, refused, or recorded and said."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.launchers import worker_command
from bigbatch.launcher.preflight import check
from bigbatch.launcher.start import check_start
from bigbatch.trainers.engine import open_engine
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.planning.environment import (
    TABLE,
    check_environment,
    recorded_variables,
    said_variables,
)

# A value of each variable that asks for something. Where a name is pinned and refused, the
# first is the pinned one's.
VALUES = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("4",),
    "ACCELERATE_MIXED_PRECISION": ("bf16", "fp8", "odd"),
    "ACCELERATE_DYNAMO_BACKEND": ("INDUCTOR", "odd"),
    "ACCELERATE_DYNAMO_MODE": ("reduce-overhead",),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ("True", "odd"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": ("True", "odd"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": ("True", "odd"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("1",),
    "TIMM_FUSED_ATTN": ("0", "true"),
    "ACCELERATE_USE_CPU": ("True", "odd"),
    "ACCELERATE_DEBUG_MODE": ("odd",),
    "ACCELERATE_CPU_AFFINITY": ("odd",),
    "FORK_LAUNCHED": ("odd",),
    "ACCELERATE_TORCH_DEVICE": ("cpu", "cuda:0"),
    "ACCELERATE_FP8_BACKEND": ("TE", "no"),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("BF16", "ANY"),
    "DNNL_DEFAULT_FPMATH_MODE": ("TF32",),
    "DS_ACCELERATOR": ("mps",),
    "NCCL_ALGO": ("Ring",),
    "ATEN_CPU_CAPABILITY": ("default",),
    "MKL_CBWR": ("COMPATIBLE",),
    "OMP_NUM_THREADS": ("1",),
}
# What our launchers and theirs set on their own, and what asks for nothing.
HARMLESS = {
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_USE_FSDP": "0",
    "ACCELERATE_FP8_BACKEND": "NO",
    "ACCELERATE_DEBUG_MODE": "true",
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    "DS_ACCELERATOR": "cpu",
    "TIMM_USE_NAFLEX": "0",
    "FSDP_VERSION": "2",
    "KMP_AFFINITY": "granularity=fine,compact,1,0",
    "RANK": "0",
    "WORLD_SIZE": "2",
}


def values(name: str) -> tuple[str, ...]:
    return VALUES.get(name, ("1",))


REFUSED = [
    (name, value)
    for row in TABLE
    if row.done == "refused"
    for name in row.names
    for value in values(name)
    if row.find({name: value})
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_cannot_be_overruled_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"^{name}={value} in the environment: .*; .*(unset|set) "):
        check_environment({"PATH": "/bin", name: value})


def test_every_variable_of_the_table_has_one_value_that_something_is_done_with() -> None:
    for row in TABLE:
        for name in row.names:
            assert any(row.find({name: value}) for value in values(name)), name


def test_what_launchers_set_and_what_asks_for_nothing_is_let_through() -> None:
    check_environment(HARMLESS)
    assert recorded_variables(HARMLESS) == {}


def test_what_chooses_among_roundings_is_recorded_and_said() -> None:
    env = {"MKL_CBWR": "COMPATIBLE", "NCCL_ALGO": "Ring", "OMP_NUM_THREADS": "3", "HOME": "/x"}
    expected = {"OMP_NUM_THREADS": "3", "MKL_CBWR": "COMPATIBLE", "NCCL_ALGO": "Ring"}
    assert recorded_variables(env) == expected
    said = said_variables(env)  # a start says the number of threads in any case
    assert [line.split(" ")[0] for line in said] == ["MKL_CBWR=COMPATIBLE", "NCCL_ALGO=Ring"]
    assert all("recorded in events.jsonl" in line for line in said)


def test_check_and_train_say_it_before_there_is_a_run(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("digits", [f"data.path={digits}"])
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_MEGATRON_LM=true"):
        check(recipe, None)
    with pytest.raises(UserError, match="ACCELERATE_USE_MEGATRON_LM=true"):
        check_start(recipe)
    with pytest.raises(UserError, match="ACCELERATE_USE_MEGATRON_LM=true"):
        open_engine("ddp", "fp32")


@pytest.fixture
def fresh_accelerate() -> None:
    """accelerate keeps what it has read once for all its objects of a process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("reduction", ["overlapped", "exact"])
def test_pinned_variables_change_no_gradient(
    monkeypatch: pytest.MonkeyPatch, reduction: str
) -> None:
    for row in TABLE:
        if row.done == "pinned":
            for name in row.names:
                monkeypatch.setenv(name, values(name)[0])
    engine = open_engine("ddp", "fp32", reduction)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    engine.prepare(model, torch.optim.SGD(model.parameters(), 0.1), 1)
    x = torch.randn(4, 3)
    engine.zero_grad()
    with engine.micro_batch(last=True):
        engine.backward(engine.model(x).square().mean())
    engine.reduce()
    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert engine.accelerator.mixed_precision == "no"
    assert engine.accelerator.state.dynamo_plugin.backend.value == "NO"
    assert torch.get_float32_matmul_precision() == "highest"


def test_attention_is_fused_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 0)  # what TIMM_FUSED_ATTN=0 does
    options = {"depth": 1, "embed_dim": 12, "num_heads": 1, "img_size": 32}
    recipe = load_recipe("digits", [f"model={json.dumps({'name': 'vit_tiny_patch16_224', 'options': options})}"])  # fmt: skip  # noqa: E501
    model = build_model(recipe.model, classes=2, channels=3, seed=0)
    assert model.blocks[0].attn.fused_attn


KNOWN = {name for row in TABLE for name in row.names}
CHANGES = [
    *("log.wandb=off", "data.workers=0", "checkpoint.every=5 steps"),
    *("global_batch=64", "micro_batch=16"),
    *("schedule.warmup=1 steps", "schedule.rewarmup=0 steps"),
]


def train(
    folder: Path, digits: Path, env: dict[str, str], launch: Sequence[str] = ()
) -> tuple[str, RunDir]:
    """What five steps say on stderr with these variables, and none other of the table."""
    run = create_run(folder, load_recipe("digits", [f"data.path={digits}", *CHANGES]))
    kept = {n: value for n, value in os.environ.items() if n not in KNOWN}
    command = worker_command(run.path, 5)
    done = subprocess.run(
        [sys.executable, "-m", *launch, *command[command.index("-m") + bool(not launch) :]],
        env=kept | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, (env, done.stdout, done.stderr)
    return done.stderr, run


def weights(run: RunDir) -> bytes:
    return (run.checkpoints / "step-00000005" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_weights_are_the_same_or_the_start_is_refused(digits: Path, tmp_path: Path) -> None:
    """Random subsets of the table; in two of three nothing is refused."""
    kinds = ("pinned", "recorded", "refused")
    names = {k: sorted({n for r in TABLE if r.done == k for n in r.names}) for k in kinds}
    _, run = train(tmp_path / "none", digits, {})
    expected, draw = weights(run), random.Random(0)
    for number in range(9):
        chosen = [n for k in kinds[: 1 + number % 3] for n in draw.sample(names[k], 2)]
        env = {name: draw.choice(values(name)) for name in chosen}
        refused = [
            n for n in env if any(r.done == "refused" and r.find({n: env[n]}) for r in TABLE)
        ]
        if refused:
            named = "|".join(f"{name}={env[name]}" for name in refused)
            with pytest.raises(UserError, match=f"^({named}) in the environment: "):
                check_environment(env)
        elif number < 5:
            said, run = train(tmp_path / str(number), digits, env)
            (start,) = [e for e in read_jsonl(run.events) if e["kind"] == "start"]
            assert start["environment"] == recorded_variables({"OMP_NUM_THREADS": "1"} | env)
            assert all(line in said for line in said_variables(env))
            if not said_variables(env):
                assert weights(run) == expected, env


@pytest.mark.slow
def test_accelerate_launch_with_gradient_accumulation_gives_the_weights_of_none(
    digits: Path, tmp_path: Path
) -> None:
    launch = ["accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--gradient_accumulation_steps", "4", "--mixed_precision", "bf16"]
    # accelerate 1.15 hands the option on for DeepSpeed alone; others set the variable.
    env = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    _, alone = train(tmp_path / "alone", digits, {})
    _, launched = train(tmp_path / "launched", digits, env, launch)
    assert weights(alone) == weights(launched)
