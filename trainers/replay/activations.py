"""What the layers of a network give in the passes of a step: how much of it is dead, at the end
of its range, or not finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ZEROING = (nn.ReLU, nn.ReLU6, nn.Threshold)  # below 0 their gradient is 0
_NEAR = 0.01  # of its range, from an end of which a value is saturated


@dataclass(frozen=True)
class Activation:
    """What one layer gave for all images of the passes, in the order of the network.

    `dead` is the share of units (a channel over all of its places, or the last dimension's) that
    were 0 for all images, of layers that can kill them; `saturated` the share of values within
    1 % of an end of their range, of layers that have one. None: no such layer.
    """

    layer: str
    kind: str
    mean: float  # of the values that are finite, as is ...
    largest: float  # ... the largest magnitude
    non_finite: float  # share of values
    dead: float | None
    saturated: float | None


class Activations:
    """Collects what layers without layers inside give, while `watched`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: dict[str, _Sums] = {}
        self._calls: dict[str, int] = {}
        # Of the newest pass: the first layer whose values are not all finite, and at which images.
        self.first_bad: tuple[str, list[int]] | None = None
        self._passed = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """One forward pass; of several, the first."""
        self._calls.clear()
        self.first_bad, self._passed = None, False
        leaves = [(n, m) for n, m in self._model.named_modules() if not any(m.children())]
        handles = [
            module.register_forward_hook(lambda m, _, out, name=name: self._see(name, m, out))
            for name, module in leaves
        ]
        handles.append(self._model.register_forward_hook(self._end))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._passed = True

    def _see(self, name: str, module: nn.Module, output: Any) -> None:
        if not (isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 1):
            return
        if self._passed:  # uphill again (SAM): the run's own weights have been seen
            return
        self._calls[name] = self._calls.get(name, 0) + 1
        layer = name if self._calls[name] == 1 else f"{name}#{self._calls[name]}"
        values = output.detach()
        good = torch.isfinite(values)
        if self.first_bad is None and not bool(good.all()):
            bad = (~good).flatten(1).any(1)
            self.first_bad = layer, torch.nonzero(bad).flatten().tolist()
        self._found.setdefault(layer, _Sums(module)).add(values, good)

    def table(self) -> tuple[Activation, ...]:
        return tuple(sums.of(layer) for layer, sums in self._found.items())


class _Sums:
    def __init__(self, module: nn.Module) -> None:
        self._kind, self._zeroing = type(module).__name__, isinstance(module, _ZEROING)
        self._range = _range(module)
        self._count = self._good = self._ends = 0
        self._sum = self._largest = 0.0
        self._alive: Tensor | None = None

    def add(self, values: Tensor, good: Tensor) -> None:
        self._count += values.numel()
        self._good += int(good.sum())
        finite = torch.where(good, values, torch.zeros_like(values))
        self._sum += float(finite.sum(dtype=torch.float64))
        self._largest = max(self._largest, float(finite.abs().max()))
        if self._zeroing:
            channel = 1 if values.ndim == 4 else values.ndim - 1
            units = (values > 0).transpose(0, channel).flatten(1).any(1)
            self._alive = units if self._alive is None else self._alive | units
        low, high = self._range
        if high is not None:
            near = _NEAR * (high - (low or 0.0))
            at_end = values >= high - near
            if low is not None:
                at_end = at_end | (values <= low + near)
            self._ends += int(at_end.sum())

    def of(self, layer: str) -> Activation:
        return Activation(
            layer,
            self._kind,
            self._sum / max(1, self._good),
            self._largest,
            1 - self._good / self._count,
            None if self._alive is None else 1 - float(self._alive.double().mean()),
            None if self._range[1] is None else self._ends / self._count,
        )


def _range(module: nn.Module) -> tuple[float | None, float | None]:
    """Between what a layer's values lie, where that is bounded above; also timm's own layers."""
    match type(module).__name__:
        case "Sigmoid" | "Hardsigmoid" | "HardSigmoid" | "HardSigmoidMe":
            return 0.0, 1.0
        case "Tanh":
            return -1.0, 1.0
        case "Hardtanh":
            return float(module.min_val), float(module.max_val)  # type: ignore[arg-type]
        case "ReLU6":
            return None, 6.0  # below, it is dead
    return None, None
