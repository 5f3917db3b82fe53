"""torch's L-BFGS, for parameters in any memory layout."""

import torch
from torch import Tensor


class LBFGS(torch.optim.LBFGS):
    """torch's own flattens gradients by `view`, which fails on channels-last ones."""

    def _gather_flat_grad(self) -> Tensor:
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad for p in self._params]
        return torch.cat([part.reshape(-1) for part in parts])
