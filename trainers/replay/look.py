"""A replayed step looked into: by micro-batch, by sample and by layer.

All of it is computed at the weights from before the step, by the passes that the step made: the
same images, masks and statistics. Three decompositions of the mean gradient g over a step of M
micro-batches of B samples are exact:

- by layer: squared norms of its parts add up to that of g;
- by micro-batch: g is the mean of their gradients, which know nothing of each other (BatchNorm
  normalises each by itself), so that `share`, <g_m, g> / (M |g|^2), adds up to 1, and `without` is
  what the norm would have been without it;
- by sample of a micro-batch: its loss is the mean of one term for each sample, and `share` of a
  term's gradient adds up to its micro-batch's. Under BatchNorm a term also depends on the other
  images, through the statistics that they share: then it is this sample's term, and not what
  would be missing had the sample not been there.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bigbatch.configs.errors import UserError
from bigbatch.data.batch import MicroBatch
from bigbatch.data.rng import key64
from bigbatch.trainers.engine.sharpness import Sharpness
from bigbatch.trainers.models.batch_stats import averaged_layers
from bigbatch.trainers.optim.groups import linear_classifier
from bigbatch.trainers.replay.activations import Activation, Activations
from bigbatch.trainers.replay.answers import Listening, Said, heard
from bigbatch.trainers.replay.replay import Replay, Replayed

_CLOSE = 1e-4  # relative: as far terms may add up to another loss, by rounding


@dataclass(frozen=True)
class Sample:
    """One sample of the step. None: not known, as `Looked.terms` says."""

    micro: int
    place: int  # in its micro-batch
    sample: int  # its number in the index
    key: str
    label: int
    mixed: tuple[tuple[str, float], ...]  # keys of others in its image, and their shares
    loss: float | None = None
    norm: float | None = None  # of its term's gradient, ...
    share: float | None = None  # ... and of the mean gradient
    layer: str | None = None  # where most of that gradient is


@dataclass(frozen=True)
class Part:
    """A micro-batch of the step."""

    micro: int
    loss: float
    norm: float
    share: float  # of the mean gradient
    without: float  # its norm without this one; NaN where there is no other
    bad_layer: str | None = None  # the first that gave values which are not finite, ...
    bad_samples: tuple[int, ...] = ()  # ... and for which images, by place


@dataclass(frozen=True)
class Looked:
    """What a look into a step found."""

    parts: tuple[Part, ...]
    samples: tuple[Sample, ...]  # of all micro-batches, or of the one that was asked for
    chosen: int  # the micro-batch whose samples have a norm and a share
    terms: str  # how far those are exact, in words
    activations: tuple[Activation, ...]
    images: dict[int, npt.NDArray[np.uint8]]  # by micro-batch [B, H, W, C], as the network saw them
    tensors: dict[str, Tensor]  # of the chosen one: images, targets, logits, loss by sample


@dataclass
class _Pass:
    """One micro-batch gone forward, its graph alive."""

    batch: MicroBatch
    images: Tensor
    targets: Tensor
    loss: Tensor
    logits: Tensor
    features: Tensor | None  # the classifier's input, for losses that look at it
    first_losses: list[Tensor] | None = None  # by sample, at the run's weights


def look(
    replay: Replay,
    replayed: Replayed,
    *,
    layers: bool = False,
    micro: int | None = None,
    key: str | None = None,
) -> Looked:
    """Look into the step that `replay.take` gave; the model is afterwards as after the step.

    Samples are looked into of one micro-batch: `micro`, that of the sample `key`, or the one with
    the largest share of the gradient. `layers` adds what activations are; where something is not
    finite they are looked at in any case. UserError where there is no such micro-batch or sample.
    """
    if replay.engine.in_round:
        raise UserError(
            f"step {replayed.past.step} is a round of global_batch post_local: its workers have "
            "gradients at weights of their own, and there is none to take apart; look at a step "
            "before global_batch.start, or compute it again by `bigbatch audit`"
        )
    return _Look(replay, replayed, layers).run(micro, key)


class _Look:
    def __init__(self, replay: Replay, replayed: Replayed, layers: bool) -> None:
        self.replay, self.job, self.engine = replay, replay.job, replay.engine
        self.step = replayed.past.step - 1
        self.replayed = replayed
        self.gradient = replayed.gradient
        self.square = math.fsum(n * n for n in replayed.norms.values())
        bad = None in (replayed.record["loss"], replayed.record["grad_norm"])
        self.activations = Activations(self.engine.module) if layers or bad else None
        config = self.job.recipe.regularise.sharpness
        self.sharpness = None if config is None else Sharpness(config, self.engine.module)
        train = self.job.inputs.splits["train"]
        self.keys: list[str] = train.keys()
        self.weights = {n: p for n, p in self.engine.own_weights().items() if p.requires_grad}

    def run(self, micro: int | None, key: str | None) -> Looked:
        micro = self._asked(micro, key)
        self.replay.restore(self.replayed.before)
        self.replay.statistics.begin()
        try:
            return self._run(micro)
        finally:
            self.replay.statistics.discard()
            self.replay.restore(self.replayed.after)
            self.engine.zero_grad()

    def _asked(self, micro: int | None, key: str | None) -> int | None:
        recipe, order, plan = self.job.recipe, self.job.inputs.order, self.job.inputs.plan
        assert order is not None
        if micro is not None and micro >= plan.micro_batches(self.step):
            raise UserError(
                f"--micro {micro}: that step of {self.replayed.past.run.name} has micro-batches "
                f"0 to {plan.micro_batches(self.step) - 1}"
            )
        if key is None:
            return micro
        samples = order.samples(np.arange(*map(plan.timeline.first, (self.step, self.step + 1))))
        places = [i for i, sample in enumerate(samples.tolist()) if self.keys[sample] == key]
        found = dict.fromkeys(i // recipe.micro_batch for i in places)
        if not found:
            raise UserError(
                f"--sample {key}: step {self.step + 1} holds no such sample; `bigbatch batches` "
                f"lists which it holds ({self.replayed.past.run.path / 'recipe.yaml'} "
                f"--steps {self.step})"
            )
        if micro is not None and micro not in found:
            raise UserError(
                f"--sample {key} is in micro-batch {next(iter(found))} of step {self.step + 1}, "
                f"not in {micro}; leave out --micro"
            )
        return next(iter(found)) if micro is None else micro

    def _run(self, micro: int | None) -> Looked:
        parts: list[Part] = []
        samples: list[Sample] = []
        images: dict[int, npt.NDArray[np.uint8]] = {}
        for batch in self.job.batches(self.step, self.step + 1):
            with nullcontext() if self.activations is None else self.activations.watched():
                done = self._forward(batch)
            parts.append(self._part(done))
            if micro in (None, batch.index):
                images[batch.index] = self._picture(done.images)
                samples += self._samples(done)
        chosen = _largest(parts) if micro is None else micro
        done = self._forward(self.job.micro_batch(self.step, chosen))
        own = [s for s in samples if s.micro == chosen]
        found, terms = self._terms(done, own)
        by_place = {s.place: s for s in found}
        tensors = {"images": done.images, "targets": done.targets, "logits": done.logits.detach()}
        if all(s.loss is not None for s in own):
            tensors["losses"] = torch.tensor([s.loss for s in own], dtype=torch.float64)
        return Looked(
            tuple(parts),
            tuple(by_place[s.place] if s.micro == chosen else s for s in samples),
            chosen,
            terms,
            () if self.activations is None else self.activations.table(),
            images,
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        )

    def _forward(self, batch: MicroBatch) -> _Pass:
        """The pass of the step: by the same seed, and uphill where the recipe goes there."""
        engine, objective = self.engine, self.job.objective
        batch = batch.to(engine.device)
        images, targets = self.job.views(batch)
        images = images.clone()  # the augmenter's memory serves the next one
        seed = key64(self.job.recipe.seed, self.step, batch.index, "model")
        first: list[Tensor] | None = None
        if self.sharpness is not None:
            torch.manual_seed(seed)
            low: Any = Listening(engine.module)  # called as the model is
            loss = objective(low, images, targets)
            first = self._each(images, targets, low, loss)
            self.sharpness.climb(loss)
        torch.manual_seed(seed)
        model: Any = Listening(engine.model)
        with heard(engine.module, self.job.recipe.loss.name) as inputs:
            loss = objective(model, images, targets)
        features = inputs[-1] if inputs else None
        return _Pass(batch, images, targets, loss, model.logits, features, first)

    def _part(self, done: _Pass) -> Part:
        count = self.job.inputs.plan.micro_batches(self.step)
        norms, dots = self._measure(self._gradients(done.loss, keep=True))
        if self.sharpness is not None:
            self.sharpness.descend()
        norm_sq, dot = math.fsum(n * n for n in norms.values()), math.fsum(dots.values())
        rest = count * count * self.square - 2 * count * dot + norm_sq
        watched = self.activations
        layer, places = (watched and watched.first_bad) or (None, [])
        return Part(
            done.batch.index,
            float(done.loss.detach()),
            math.sqrt(norm_sq),
            dot / (count * self.square) if self.square else 0.0,
            math.sqrt(max(0.0, rest)) / (count - 1) if count > 1 else math.nan,
            layer,
            tuple(places),
        )

    def _gradients(self, loss: Tensor, *, keep: bool) -> dict[str, Tensor]:
        scaler = self.engine.scaler  # fp16's small values would vanish without it
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        found = torch.autograd.grad(
            loss * scale, list(self.weights.values()), retain_graph=keep, allow_unused=True
        )
        pairs = zip(self.weights, found, strict=True)
        return {name: g / scale for name, g in pairs if g is not None}

    def _measure(
        self, gradients: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """By parameter: the norm, and the product with the step's mean gradient, in float64."""
        names = [name for name in gradients if name in self.gradient]
        rows = []
        for name in names:
            g = gradients[name].double()
            rows.append(torch.stack([g.norm(), (g * self.gradient[name]).sum()]))
        table = torch.stack(rows).tolist() if rows else []
        return (
            {name: row[0] for name, row in zip(names, table, strict=True)},
            {name: row[1] for name, row in zip(names, table, strict=True)},
        )

    def _picture(self, images: Tensor) -> npt.NDArray[np.uint8]:
        """The first view of each image, in bytes, without the normalisation."""
        augmenter, count = self.job.augmenter, self.job.recipe.micro_batch
        seen = images[:count].float()
        seen = seen * augmenter.std[:, None, None] + augmenter.mean[:, None, None]
        pixels = (seen.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
        found: npt.NDArray[np.uint8] = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return found

    def _samples(self, done: _Pass) -> list[Sample]:
        batch = done.batch
        shares = self.job.augmenter.shares(batch).cpu()
        losses = done.first_losses
        if losses is None:
            losses = self._each(
                done.images, done.targets, Said(done.logits, done.features), done.loss
            )
        keys = [self.keys[sample] for sample in batch.samples.tolist()]
        values = torch.stack(losses).tolist() if losses else [None] * len(keys)
        return [
            Sample(
                batch.index,
                i,
                int(batch.samples[i]),
                keys[i],
                int(batch.labels[i]),
                tuple(
                    (keys[j], float(shares[i, j]))
                    for j in torch.nonzero(shares[i]).flatten().tolist()
                    if j != i
                ),
                values[i],
            )
            for i in range(len(keys))
        ]

    def _each(
        self, images: Tensor, targets: Tensor, said: "Listening | Said", loss: Tensor
    ) -> list[Tensor]:
        """The loss's term for each sample, attached to the graph; [] where it does not split so."""
        views, count = self.job.recipe.views, len(targets)
        terms = []
        for i in range(count):
            rows = [i + count * view for view in range(views)]
            answer = self._answer(said, rows)
            try:
                terms.append(self.job.objective(answer, images[rows], targets[i : i + 1]))
            except (AssertionError, UserError):  # it looks at more of the network than its answer
                return []
        mean = float(torch.stack([term.detach().double() for term in terms]).mean())
        whole = float(loss.detach())
        close = abs(mean - whole) <= _CLOSE * max(1.0, abs(whole))
        return terms if close or not (math.isfinite(mean) and math.isfinite(whole)) else []

    def _answer(self, said: "Listening | Said", rows: list[int]) -> Any:
        features = getattr(said, "features", None)
        if features is None:
            return lambda _: said.logits[rows]
        head: Any = linear_classifier(self.engine.module, "replay")[1]
        return lambda _: head(features[rows])

    def _terms(self, done: _Pass, samples: list[Sample]) -> tuple[list[Sample], str]:
        """The samples of a micro-batch with norm, share and layer, and what these are worth."""
        said = Said(done.logits, done.features)
        terms = self._each(done.images, done.targets, said, done.loss)
        if not terms:
            if self.sharpness is not None:
                self.sharpness.descend()
            return samples, (
                f"loss {self.job.recipe.loss.name} has no term for each sample here: samples have "
                "no norm and no share, micro-batches have"
            )
        number = self.job.inputs.plan.timeline.batch(self.step)
        found = []
        for sample, term in zip(samples, terms, strict=True):
            norms, dots = self._measure(self._gradients(term, keep=True))
            found.append(
                replace(
                    sample,
                    norm=math.sqrt(math.fsum(n * n for n in norms.values())),
                    share=math.fsum(dots.values()) / (number * self.square) if self.square else 0.0,
                    layer=max(norms, key=lambda name: _order(norms[name])) if norms else None,
                )
            )
        if self.sharpness is not None:
            self.sharpness.descend()
        words = "exact: a sample's share is that of its own term of the loss"
        if averaged_layers(self.engine.module):
            words += (
                "; BatchNorm lets that term depend on the other images of the micro-batch too, so "
                "it is not what would be missing without the sample"
            )
        return found, words


def _order(value: float) -> float:
    """For the largest: what is not finite is larger than all that is."""
    return value if math.isfinite(value) else math.inf


def _largest(parts: list[Part]) -> int:
    """The first micro-batch that is not finite, or the one with the largest share."""
    wrong = [p.micro for p in parts if not (math.isfinite(p.loss) and math.isfinite(p.norm))]
    return wrong[0] if wrong else max(parts, key=lambda p: p.share).micro
