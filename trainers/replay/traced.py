"""All that a step makes on its way, as digests in the order in which it is made.

So two runs can be compared below their ledgers without holding one step's tensors while the other
is made. A digest is BLAKE2b-128 of bytes, dtype and shape: what is equal here is equal.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigbatch.configs.files import to_json
from bigbatch.data.batch import MicroBatch
from bigbatch.trainers.losses.build import Objective
from bigbatch.trainers.optim import optimizer_state_by_name
from bigbatch.trainers.replay.replay import Replay

# What two steps are compared in, in this order, and how each is called.
STAGES = {
    "state": "the state before the step",
    "keys": "the samples",
    "pixels": "the pixels as augmented",
    "targets": "the labels as mixed",
    "output": "what a module gave",
    "loss": "the loss of a micro-batch",
    "micro_gradient": "the gradient of a micro-batch",
    "gradient": "the reduced gradient",
    "update": "the update",
    "optimizer": "the optimizer's state after the step",
    "buffers": "running statistics after the step",
}
SETTINGS = "settings"  # of the optimizer: they explain an update, and are none
_SHOWN = ("keys", "loss", SETTINGS)  # stages whose values are words, no digests


class Seen(NamedTuple):
    where: str
    value: str


class Trace:
    """What one step made: by stage, in order."""

    def __init__(self, step: int) -> None:
        self.step = step  # finished steps after it
        self.stages: dict[str, list[Seen]] = {name: [] for name in (*STAGES, SETTINGS)}

    def add(self, stage: str, where: str, value: str) -> None:
        self.stages[stage].append(Seen(where, value))


class Apart(NamedTuple):
    """A stage of a step in two runs."""

    stage: str
    compared: int
    differ: int
    where: str | None = None  # the first that differs
    values: tuple[str, str] | None = None  # of A and B, where they are words


def compare_traces(a: Trace, b: Trace) -> list[Apart]:
    """The stages in order, and the settings of the optimizer as the last."""
    return [_compared(stage, a.stages[stage], b.stages[stage]) for stage in a.stages]


def _compared(stage: str, ours: list[Seen], theirs: list[Seen]) -> Apart:
    compared = min(len(ours), len(theirs))
    wrong = [i for i in range(compared) if ours[i] != theirs[i]]
    more = max(len(ours), len(theirs)) - compared
    if not wrong and not more:
        return Apart(stage, compared, 0)
    if not wrong:
        rest = (ours if len(ours) > compared else theirs)[compared]
        side = "A" if len(ours) > compared else "B"
        return Apart(stage, compared, more, f"{rest.where}, which {side} alone has")
    one, other = ours[wrong[0]], theirs[wrong[0]]
    where = one.where if one.where == other.where else f"{one.where} in A, {other.where} in B"
    values = (one.value, other.value) if stage in _SHOWN else None
    return Apart(stage, compared, len(wrong) + more, where, values)


class Tracer:
    """Makes steps of a replay, and writes down what they make."""

    def __init__(self, replay: Replay) -> None:
        self._replay, self._engine = replay, replay.engine
        self._index = replay.job.inputs.splits["train"]
        self._keys = self._index.keys()
        # Passes of a micro-batch that belong to its gradient; L-BFGS makes more, which do not.
        self._most = 2 if replay.job.recipe.regularise.sharpness is not None else 1
        self._compiled = replay.job.recipe.model.compile
        self._trace = Trace(0)
        self._at = ""
        self._names: list[str] = []  # of the samples of a micro-batch
        self._passes = self._calls = 0

    def step(self) -> Trace:
        """The next step of the replay."""
        replay, engine = self._replay, self._engine
        trace = self._trace = Trace(replay.job.state.step + 1)
        for stage, some in self._state().items():
            title = "optimizer's " if stage == "optimizer" else ""
            trace.stages["state"] += [Seen(f"{title}{name}", value) for name, value in some]
        replay.watch, engine.keeps = self, True
        try:
            with self._hooks():
                replay.advance(trace.step)
        finally:
            replay.watch, engine.keeps = None, False
        for name, gradient in engine.gradient.items():
            trace.add("gradient", name, digest(gradient))
        for number, group in enumerate(engine.optimizer.param_groups):
            for name, value in group.items():
                if isinstance(value, int | float | str | tuple):
                    trace.add(SETTINGS, f"{name} of group {number}", to_json(value))
        trace.stages |= self._state()
        return trace

    def micro_batch(self, batch: MicroBatch) -> MicroBatch:
        self._passes = self._calls = 0
        self._at = f"micro-batch {batch.index}"
        labels = batch.labels.tolist()
        self._names = []
        for place, sample in enumerate(batch.samples.tolist()):
            key = self._keys[sample]
            name = f"{key}, {self._at}, place {place}"
            crc = int(self._index.crc[sample])
            self._trace.add("keys", name, f"label {labels[place]}, CRC-32C {crc:08x}")
            self._names.append(name)
        return batch

    def objective(self, objective: Objective) -> Objective:
        def seen(model: Any, images: Tensor, targets: Tensor) -> Tensor:
            self._passes += 1
            if self._passes == 1:
                self._rows("pixels", images)
                self._rows("targets", targets)
            loss = objective(model, images, targets)
            if self._passes <= self._most:
                self._trace.add("loss", self._here(), repr(float(loss.detach())))
            return loss

        return seen

    def _here(self) -> str:
        return self._at if self._passes == 1 else f"{self._at}, pass {self._passes}"

    def _rows(self, stage: str, values: Tensor) -> None:
        """A digest for each sample, of all its views."""
        count = len(self._names)
        for place, name in enumerate(self._names):
            self._trace.add(stage, name, digest(values[place::count]))

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            # A hook would make another code of a compiled network than the run had.
            modules = () if self._compiled else self._engine.module.named_modules()
            for name, module in modules:
                hook = partial(self._output, name or "the network")
                stack.callback(module.register_forward_hook(hook).remove)
            for name, parameter in self._engine.own_weights().items():
                if parameter.requires_grad:
                    hooked = partial(self._gradient, name)
                    stack.callback(parameter.register_post_accumulate_grad_hook(hooked).remove)
            yield

    def _output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._passes <= self._most:
            self._calls += 1
            found = [digest(tensor) for tensor in _tensors(output)]
            self._trace.add(
                "output", f"{name}, {self._here()}, call {self._calls}", " ".join(found)
            )

    def _gradient(self, name: str, parameter: Tensor) -> None:
        if self._passes <= self._most and parameter.grad is not None:
            self._trace.add("micro_gradient", f"{name}, {self._here()}", digest(parameter.grad))

    def _state(self) -> dict[str, list[Seen]]:
        """All that a checkpoint holds of weights and optimizer, by the stage that makes it."""
        module = self._engine.module
        weights = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        seen = [(name, Seen(name, digest(t))) for name, t in module.state_dict().items()]
        tensors, scalars = optimizer_state_by_name(self._engine.optimizer, module)
        values = {name: digest(t) for name, t in tensors.items()}
        values |= {name: to_json(value) for name, value in scalars.items()}
        return {
            "update": [one for name, one in seen if name in weights],
            "optimizer": [Seen(name, value) for name, value in values.items()],
            "buffers": [one for name, one in seen if name not in weights],
        }


def digest(tensor: Tensor) -> str:
    """32 hex digits over a tensor's bits, dtype and shape, whatever its memory format."""
    values = tensor.detach().cpu().contiguous()
    found = hashlib.blake2b(f"{values.dtype} {tuple(values.shape)} ".encode(), digest_size=16)
    found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
