"""torch.compile for training alone: the same masks, plain names, refused where nothing compiles.

That ranks and resumes agree is tests/launcher/test_prove.py.
"""

import copy
from collections.abc import Callable
from shutil import which
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.trainers.engine.compiled import (
    as_written,
    check_compiler,
    compile_network,
    forget_compiled,
)
from bigbatch.trainers.engine.ddp import DdpEngine

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.4)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(8 * 36, 5))


def in_its_place(module: nn.Module, answer: Callable[..., Any]) -> nn.Module:
    """`module` with what stands for compiled code."""
    module._compiled_call_impl = answer
    return module


def test_a_compiled_module_keeps_its_names_and_computes_as_written_where_asked() -> None:
    plain, x = network().eval(), torch.zeros(2, 1, 8, 8)
    module = in_its_place(copy.deepcopy(plain), lambda x: "compiled")
    assert module(x) == "compiled"
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(copy.deepcopy(module)(x), plain(x))  # a copy is not compiled
    with as_written(module):
        assert torch.equal(module(x), plain(x))
    assert module(x) == "compiled"
    with pytest.raises(ZeroDivisionError), as_written(module):
        raise ZeroDivisionError
    assert module(x) == "compiled"
    forget_compiled(module)
    assert torch.equal(module(x), plain(x))


def test_an_engine_evaluates_and_ends_with_the_network_as_it_is_written() -> None:
    module, x = network().eval(), torch.zeros(2, 1, 8, 8)
    engine = DdpEngine("fp32", "exact")
    engine.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1), 1)
    in_its_place(engine.module, lambda x: "compiled")
    assert engine.model(x) == "compiled"
    with engine.full_model() as whole:
        assert isinstance(whole(x), Tensor)
    assert engine.model(x) == "compiled"
    engine.end_training()
    assert isinstance(engine.module(x), Tensor)


def test_where_nothing_compiles_it_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    says = r"compiled for cpu on this machine \(InvalidCxx.* found\); install a C\+\+ compiler .*"
    with pytest.raises(UserError, match=says + "or set model.compile to false$"):
        compile_network(network(), CPU)
    # What TORCHDYNAMO_DISABLE=1 makes of it.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(UserError, match=r"compiles nothing in this process.*; unset it"):
        compile_network(network(), CPU)


@pytest.mark.slow
@pytest.mark.skipif(not (which("g++") or which("clang++")), reason="there is no C++ compiler")
def test_compiled_passes_drop_what_plain_ones_drop() -> None:
    """Same masks from the same seed, and gradients and statistics within rounding; two sizes."""
    check_compiler(CPU)
    plain = network()[:-2]  # any size
    module = copy.deepcopy(plain)
    compile_network(module, CPU)
    for number, size in enumerate((8, 8, 10)):
        x = torch.randn(4, 1, size, size, generator=torch.Generator().manual_seed(number))
        outputs = []
        for one in (plain, module):
            one.zero_grad()
            torch.manual_seed(number)
            outputs.append(one(x))
            (outputs[-1] * x[:, :, 2:, 2:].sin()).sum().backward()
        dropped = [output == 0 for output in outputs]
        assert torch.equal(*dropped)
        assert 0.5 < float(dropped[0].float().mean()) < 0.9
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(module[0].weight.grad, plain[0].weight.grad)
        torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()))
