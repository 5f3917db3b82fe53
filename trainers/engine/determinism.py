"""What `determinism: full` asks of torch and of NVIDIA's libraries, and what cannot be had so.

Sources: torch 2.14, `torch.use_deterministic_algorithms`; NVIDIA's cuBLAS documentation, "Results
reproducibility", for the variable, which is read when the first product on a GPU is made.
"""

import os
import re

import torch

from bigbatch.configs.errors import UserError

_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")  # with others cuBLAS may add up in another order
_NO_FORM = re.compile(r"(\S+) does not have a deterministic implementation")


def choose_algorithms(*, deterministic: bool) -> None:
    """Let this process compute by algorithms that give the same bits each time, or by any.

    Before anything has been computed on a GPU. Raises UserError where the environment forbids it.
    """
    if deterministic and torch.cuda.is_available():
        chosen = os.environ.setdefault(_VARIABLE, _WORKSPACES[0])
        if chosen not in _WORKSPACES:
            raise UserError(
                f"determinism = full, and {_VARIABLE}={chosen} in the environment lets cuBLAS add "
                f"up in another order each time; unset it, or set it to {' or '.join(_WORKSPACES)}"
            )
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # it imports the compiler
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic


def without_form(error: Exception) -> UserError | None:
    """The user's error that torch's refusal of an operation is; None of other errors."""
    found = _NO_FORM.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None or not torch.are_deterministic_algorithms_enabled():
        return None
    return UserError(
        f"determinism = full, and the operation {found[1]} has no deterministic form on this "
        "device; choose another model, loss or augmentation, or train a new run or a branch "
        "(`bigbatch fork`) with determinism=none"
    )
