"""Sharpness-aware minimisation: to the worst weights nearby before each backward pass, and back.

Foret et al. 2021 (arXiv:2010.01412); Kwon et al. 2021 (arXiv:2102.11600).
"""

import torch
from torch import Tensor, nn

from bigbatch.configs.regularise import ASAM, SAM


class Sharpness:
    """Moves `module`'s weights, trained ones, up the gradient of one micro-batch's loss.

    Each micro-batch climbs alone, by its own gradient, so the result does not depend on ranks.
    The loop's own pass, and the exchange of its gradients, then take place at the moved weights.
    """

    def __init__(self, config: SAM | ASAM, module: nn.Module) -> None:
        named = [*module.named_parameters()]
        self._weights = [p for _, p in named]
        self._config = config
        # The authors' code scales what is called weight, norms' too, and leaves biases as in SAM.
        self._relative = [name.rpartition(".")[2] == "weight" for name, _ in named]
        self._kept: list[Tensor] = []

    def climb(self, loss: Tensor) -> None:
        """w + rho T^2 g / |T g|, g the gradient of `loss` and T 1, or |w| + eta under ASAM."""
        learning = [w for w in self._weights if w.requires_grad]  # others wait to learn
        known = dict(
            zip(learning, torch.autograd.grad(loss, learning, allow_unused=True), strict=True)
        )
        found = [known.get(w) for w in self._weights]
        gradients = [
            torch.zeros_like(w) if g is None else g
            for w, g in zip(self._weights, found, strict=True)
        ]
        with torch.no_grad():
            scales = self._scales()
            steps = [g if t is None else t * g for g, t in zip(gradients, scales, strict=True)]
            norm = nn.utils.get_total_norm(steps)
            factor = self._config.rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            self._kept = [w.clone() for w in self._weights]
            for weight, step, scale in zip(self._weights, steps, scales, strict=True):
                weight.add_(factor * (step if scale is None else scale * step))

    def descend(self) -> None:
        """The weights from before, bit for bit."""
        with torch.no_grad():
            for weight, kept in zip(self._weights, self._kept, strict=True):
                weight.copy_(kept)
        self._kept = []

    def _scales(self) -> list[Tensor | None]:
        match self._config:
            case ASAM(eta=eta):
                pairs = zip(self._weights, self._relative, strict=True)
                return [w.abs() + eta if relative else None for w, relative in pairs]
            case SAM():
                return [None] * len(self._weights)
