"""The GPU's kernels on any machine: in Triton's interpreter, and compiled for real GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigbatch.trainers.optim import LARS, layerwise

pytest.importorskip("triton", reason="this torch came without Triton")


@pytest.mark.slow
def test_kernels_step_as_the_path_on_a_cpu_does() -> None:
    tests = Path(__file__).parents[2] / "helpers" / "interpreted_kernels.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def test_where_kernels_do_not_run_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from bigbatch.trainers.optim import gpu

    assert layerwise.gpu_kernels(LARS, torch.device("cpu")) is None
    monkeypatch.setattr(gpu, "refusal", lambda kind, device: "no C compiler")
    layerwise.gpu_kernels.cache_clear()
    with pytest.warns(UserWarning, match="LARS steps without Triton, .*: no C compiler"):
        assert layerwise.gpu_kernels(LARS, torch.device("cuda", 7)) is None
    layerwise.gpu_kernels.cache_clear()


POINTERS = {"addresses": "*i64", "chunks": "*i64", "sizes": "*i64", "first": "*i64",
            "partial": "*fp32", "ratios": "*fp32", "squares": "*fp64", "out": "*fp64",
            "layers": "i32", "count": "i32"}  # fmt: skip

LARS_FLAGS = ("ADAPT", "INSIDE", "NESTEROV", "CLIP", "LR_ON_DEVICE")


@pytest.mark.parametrize(("kind", "capability"), [("float32", 80), ("bfloat16", 90)])
def test_kernels_compile_for_gpus_and_read_16_bytes_at_a_time(kind: str, capability: int) -> None:
    """Needs no GPU: Triton brings its compiler and assembler."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bigbatch.trainers.optim import gpu, kernels

    on, off = dict.fromkeys(LARS_FLAGS, True), dict.fromkeys(LARS_FLAGS, False)
    for name, flags in [
        ("lars_squares", {}),
        ("lars_update", on),
        ("lars_update", off),
        ("lamb_moments", {"CORRECT": True}),
        ("lamb_moments", {"CORRECT": False}),
        ("lamb_update", {"CORRECT": True, "LR_ON_DEVICE": True}),
        ("lamb_update", {"CORRECT": False, "LR_ON_DEVICE": False}),
    ]:
        kernel = getattr(kernels, name)
        constants = {"kind": getattr(tl, kind), "CHUNK": gpu.CHUNK, **flags}
        types = {n: POINTERS.get(n, "fp32") for n in kernel.arg_names}
        if flags.get("LR_ON_DEVICE"):
            types["lr"] = "*fp32"
        signature = {n: "constexpr" if n in constants else t for n, t in types.items()}
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
            options=gpu.OPTIONS,
        )
        assert re.search(r"ld\.global\.v4", compiled.asm["ptx"]), name
        assert compiled.asm["cubin"]
