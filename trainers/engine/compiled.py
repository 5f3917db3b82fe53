"""torch.compile for the passes of training, exact over ranks and resumes.

A module that is compiled in place keeps the names of its parameters, and copies of it are not
compiled. Its code must follow from (module, shape of the images) alone, never from what a process
has seen before, or a resumed run would compute with other code than one that was not stopped:

- Shapes are constants, each with its own code: by default torch makes a dimension symbolic once
  it has seen a second size.
- Where torch would give a module up after so many sizes and go on without compiling it, the run
  ends instead.
- Random numbers are eager torch's (`fallback_random`), from the stream that the loop seeds for
  each micro-batch: the same masks as without compiling, which Inductor's own are not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bigbatch.configs.errors import UserError

# `deterministic`: kernels are chosen by rule, not by timing them, which would differ by process.
_OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {
    "fallback_random": True,
    "deterministic": True,
}
# Codes of one module: by size of the images, and by which of its parts learn.
_MOST_CODES = 256


def compile_network(module: nn.Module, device: torch.device) -> None:
    """Compile the passes of `module`, as they come. Raises UserError where nothing compiles."""
    import torch._dynamo.config as settings  # a second or two, for who compiles alone

    settings.disable = settings.suppress_errors = False  # whatever the environment says
    settings.recompile_limit = settings.accumulated_recompile_limit = _MOST_CODES
    settings.fail_on_recompile_limit_hit = True
    check_compiler(device)
    module.compile(dynamic=False, options=_OPTIONS)


def check_compiler(device: torch.device) -> None:
    """Raise UserError where a small function cannot be compiled, forward and backward."""
    where = "a C++ compiler (g++ or clang++)" if device.type == "cpu" else "Triton, a C compiler"

    def trial(x: Tensor) -> Tensor:
        return (x.sin() * (2 if torch.compiler.is_dynamo_compiling() else 3)).sum()

    x = torch.zeros(8, device=device, requires_grad=True)
    try:
        torch.compile(trial, dynamic=False, options=_OPTIONS)(x).backward()
    except Exception as error:  # of the compiler, the linker, Triton or the driver, each its own
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"model.compile: nothing can be compiled for {device.type} on this machine ({first}); "
            f"install {where} and Python's headers, or set model.compile to false"
        ) from error
    if x.grad is None or not bool((x.grad == 2).all()):
        raise UserError(
            "model.compile: torch compiles nothing in this process, for which TORCHDYNAMO_DISABLE "
            "in the environment asks; unset it, or set model.compile to false"
        )


@contextmanager
def as_written(module: nn.Module) -> Iterator[None]:
    """Within the block `module` computes as it is written, whether it was compiled or not."""
    compiled = module._compiled_call_impl
    module._compiled_call_impl = None
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


def forget_compiled(module: nn.Module) -> None:
    """Let `module` compute as it is written from here on."""
    module._compiled_call_impl = None
