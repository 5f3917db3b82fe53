"""A round of post-local SGD: workers with weights of their own, and their average.

Lin et al. 2018 (arXiv:1808.07217). Momenta are averaged with the weights (Yu et al. 2019,
arXiv:1905.03817), so that behind a round a run is what it always is: one set of
weights and one optimizer state, the same on every rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.configs.clipping import Clip
from bigbatch.trainers.optim.clip import clip_gradients


@dataclass
class _Worker:
    """One set of weights, and what its optimizer and its next update know."""

    weights: list[Tensor]  # of the trained parameters, in their order
    state: list[dict[str, Any]]  # of the optimizer, likewise
    sums: list[Tensor]  # float64, of its gradients since its last update
    passes: int = 0  # of these


class LocalRounds:
    """The workers that this rank trains. Micro-batch i of a round is worker i % K's.

    A rank has micro-batches rank, rank + W, ... of the W ranks; where W divides K these are of
    whole workers, and nothing crosses ranks before the end of the round. A worker's parameters are
    tensors that the model's take in their place (`Parameter.data`) while it goes forward.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        workers: int,
        each: int,
        clip: Clip | None,
        ranks: tuple[int, int],
        total: Callable[[Tensor], Tensor],
    ) -> None:
        """Of `workers` K, whose updates are of `each` micro-batches. `ranks`: this one, of W.

        `total` adds a tensor up over all ranks.
        """
        self.micro_batches = workers * each  # of one update of all workers
        self._module, self._optimizer, self._clip = module, optimizer, clip
        self._workers, self._each, self._total = workers, each, total
        self._rank, self._world = ranks
        assert workers % self._world == 0, "each rank trains whole workers"
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._common = [p.data for p in self._parameters]
        self._there: dict[int, _Worker] = {}
        self._next: list[Tensor] = []  # the averages, once a round is over
        self._passes = 0

    def begin(self) -> None:
        """Begin a round: every worker is what the run is."""
        self._common = [p.data for p in self._parameters]
        self._states = [self._optimizer.state[p] for p in self._parameters]
        self._passes = 0
        for number in range(self._rank, self._workers, self._world):
            self._there[number] = _Worker(
                [weights.clone() for weights in self._common],
                [_copied(state) for state in self._states],
                [torch.zeros_like(w, dtype=torch.float64) for w in self._common],
            )

    def enter(self) -> None:
        """Let the model be the worker whose micro-batch comes next on this rank."""
        number = (self._rank + self._world * self._passes) % self._workers
        self._now = self._there[number]
        self._be(self._now.weights, self._now.state)

    def add(self) -> bool:
        """Take in the gradients of a micro-batch; whether the worker has now to be updated."""
        now = self._now
        for part, parameter in zip(now.sums, self._parameters, strict=True):
            if parameter.grad is not None:
                part.add_(parameter.grad)
        now.passes += 1
        self._passes += 1
        return now.passes == self._each

    def update(self, step: Callable[[], object]) -> None:
        """An update of this worker alone; `step` is the optimizer's."""
        now = self._now
        for part, parameter in zip(now.sums, self._parameters, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(part.div_(self._each))
            part.zero_()
        if self._clip is not None:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            clip_gradients(self._clip, self._module, nn.utils.get_total_norm(gradients))
        step()
        now.passes = 0

    @torch.no_grad()
    def average(self) -> None:
        """End the round: the model is again what the run was, and its gradients are by how much
        the average of all workers is less. Collective.

        Added up in float64, as gradients are, so that the number of ranks changes no bit.
        """
        self._be(self._common, self._states)
        workers = list(self._there.values())
        self._kinds = sorted({(i, k) for i, s in enumerate(workers[0].state) for k in _tensors(s)})
        sums = [
            torch.stack([t.double() for t in each]).sum(0)
            for each in zip(*(self._of(worker) for worker in workers), strict=True)
        ]
        flat = self._total(torch.cat([s.flatten() for s in sums])).div_(self._workers)
        parts = flat.split([s.numel() for s in sums])
        like = self._of(workers[0])
        self._next = [p.view_as(t).to(t.dtype) for p, t in zip(parts, like, strict=True)]
        for parameter, weights in zip(self._parameters, self._next, strict=False):
            if parameter.grad is not None:
                parameter.grad.copy_(parameter.data - weights)

    @torch.no_grad()
    def take(self) -> None:
        """Make the averages the run's weights and its optimizer's state."""
        count = len(self._parameters)
        for weights, mean in zip(self._common, self._next[:count], strict=True):
            weights.copy_(mean)
        last = next(iter(self._there.values()))
        for own, state in zip(self._states, last.state, strict=True):
            own |= {k: v for k, v in state.items() if k not in own or not torch.is_tensor(v)}
        for (number, key), mean in zip(self._kinds, self._next[count:], strict=True):
            self._states[number][key].copy_(mean)

    def _be(self, weights: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        for parameter, own, state in zip(self._parameters, weights, states, strict=True):
            parameter.data = own
            self._optimizer.state[parameter] = state

    def _of(self, worker: _Worker) -> list[Tensor]:
        """What is averaged of a worker: weights, then tensors of its optimizer's state."""
        return [*worker.weights, *(worker.state[number][key] for number, key in self._kinds)]


def _tensors(state: dict[str, Any]) -> list[str]:
    return [key for key, value in state.items() if torch.is_tensor(value)]


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()}
