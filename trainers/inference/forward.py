"""Forward passes of several members over the same images, each image decoded once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.size import height_width
from bigbatch.configs.targets import learns_numbers
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import Decoding, MicroBatch
from bigbatch.data.begun import Begun
from bigbatch.data.geometry import View
from bigbatch.data.index import Index
from bigbatch.data.loader import eval_batches
from bigbatch.data.order import Positions
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.ensemble.combination import Logits, log_softmax
from bigbatch.trainers.ensemble.evaluations import EnsembleStatistics
from bigbatch.trainers.ensemble.folder import Ensemble
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.evaluation.evaluate import (
    FEW_IMAGES,
    autocast,
    fitting_batch,
    gather_in_order,
    gather_statistics,
    in_parts,
    labels_of,
)
from bigbatch.trainers.evaluation.statistics import Statistics
from bigbatch.trainers.inference.dropout import drop, let_drop
from bigbatch.trainers.inference.looks import looks_of, view_of
from bigbatch.trainers.inference.progress import Progress
from bigbatch.trainers.models.build import build_augmenter
from bigbatch.trainers.models.joined import WHY
from bigbatch.trainers.optim.groups import classifiers, linear_classifier

Features = npt.NDArray[np.float32]  # [N, D]


@dataclass(frozen=True, eq=False)
class Outputs:
    """What the members say of one batch, in the order of its samples.

    `logits` and `features` are those of the n samples that could be read; `bad` holds the
    others, as (sample, reason).
    """

    number: int  # of the batch
    samples: Positions  # int64 [n]
    logits: Logits  # float32 [M, n, C]
    bad: tuple[tuple[int, str], ...]
    features: Features | None = None  # [n, D1 + D2 + ...], of one member beside the other


@dataclass(frozen=True, eq=False)
class _Loaded:
    member: Member
    model: nn.Module
    augmenter: Augmenter


class Forward:
    """Members on this rank's device. Batch b of an index goes to rank b % world.

    Members that look at images alike share their decoding, their copy to the device and their
    crops; mean, std and precision are each member's own. `tta` names the looks that are taken of
    an image (looks.py), and with `mc_dropout` as many passes are made of each look, in which
    members drop at random (dropout.py); their probabilities, or numbers, are averaged. A batch's
    logits depend on neither the rank that computes them nor the batches before. `begun` decodes
    the first batches of an index already (ahead.py).
    """

    def __init__(
        self,
        engine: Engine,
        members: Sequence[Member],
        *,
        tta: str = "none",
        mc_dropout: int = 0,
        batch: int | None = None,
        features: bool = False,
        begun: Begun | None = None,
    ) -> None:
        self.engine = engine
        self.members = members
        self._begun = begun
        self.classes = len(members[0].classes)
        first = members[0].recipe
        self.data = first.data
        self.batch = fitting_batch(batch or first.evaluate.batch, self.classes, engine.device)
        self.tta, self.mc_dropout = tta, mc_dropout
        groups: dict[View, list[int]] = {}
        for place, member in enumerate(members):
            groups.setdefault(view_of(member.recipe), []).append(place)
        self._groups = groups
        self._loaded = [self._load(member) for member in members]
        self.parameters = sum(p.numel() for m in self._loaded for p in m.model.parameters())
        looks = looks_of(self._loaded[0].augmenter.eval_view, tta)
        self.passes = len(looks) * max(1, mc_dropout)  # of each member, over each image
        # What goes into each member's classifier, of one look after another.
        self._features: list[list[Tensor]] = []
        if features:
            self._features = [_watch(loaded) for loaded in self._loaded]

    def _load(self, member: Member) -> _Loaded:
        recipe, device = member.recipe, self.engine.device
        if recipe.precision == "fp16" and device.type == "cpu":
            raise UserError(
                f"member {member.name}: precision = fp16 needs a GPU; leave it out with --members, "
                "or start on a machine that has one"
            )
        model = member.build(device)
        if self.mc_dropout:
            let_drop(model)
        return _Loaded(member, model, build_augmenter(recipe, self.classes, device))

    def outputs(self, index: Index, *, leave_out_bad: bool = False) -> Iterator[Outputs]:
        """This rank's batches, in order. An unreadable sample raises UserError, or is left out."""
        begun, self._begun = self._begun, None  # it has begun with one index
        few = begun is None and -(-len(index) // self.engine.world) <= FEW_IMAGES
        streams = []
        for view in self._groups:
            decoding = Decoding(
                image_size=max(height_width(view.out)),
                channels=self.data.channels,
                workers=0 if few else self.data.workers,
                threads=max(self.data.threads, torch.get_num_threads() if few else 1),
                pin_memory=self.engine.device.type == "cuda",
                view=view if self.tta in ("none", "flip") else None,
            )
            streams.append(
                eval_batches(
                    index,
                    decoding,
                    batch=self.batch,
                    rank=self.engine.rank,
                    world=self.engine.world,
                    leave_out_bad=leave_out_bad,
                    begun=begun,
                )
            )
        for batches in zip(*streams, strict=True):
            first = batches[0]
            for batch in batches:  # decoded once for each size that is seen
                if not np.array_equal(batch.samples, first.samples):
                    odd = int(np.setxor1d(batch.samples, first.samples)[0])
                    raise UserError(
                        f"sample {odd:,} of {index.place} could be read once and not again; the "
                        "disk or the file is changing: start again"
                    )
            logits = np.empty((len(self.members), len(first.samples), self.classes), np.float32)
            if len(first.samples):
                with torch.inference_mode():
                    for places, batch in zip(self._groups.values(), batches, strict=True):
                        self._fill(logits, places, batch)
            yield Outputs(
                first.index,
                first.samples,
                logits,
                tuple((entry["sample"], entry["reason"]) for entry in first.bad),
                self._taken_features(len(first.samples)) if self._features else None,
            )

    def _fill(self, logits: Logits, places: list[int], batch: MicroBatch) -> None:
        """Write the logits of the members at `places`, which look at images alike."""
        augmenter = self._loaded[places[0]].augmenter
        looks = looks_of(augmenter.eval_view, self.tta)
        outputs: dict[int, list[Tensor]] = {place: [] for place in places}
        for number, look in enumerate(looks):
            images = augmenter.crop_and_warp(batch, look)
            for place in places:
                mine = images.clone() if len(places) > 1 else images  # normalising overwrites
                outputs[place] += self._forward(self._loaded[place], mine, batch.index, number)
        for place in places:
            arrays = [output.cpu().numpy() for output in outputs.pop(place)]
            for array in arrays:
                self._check(array, self.members[place], batch)
            if len(arrays) == 1:
                logits[place] = arrays[0]
            elif learns_numbers(self.members[place].recipe):
                logits[place] = np.mean(np.array(arrays, np.float64), axis=0)
            else:
                logits[place] = _mean_log_probability(arrays)

    def _forward(self, loaded: _Loaded, images: Tensor, batch: int, look: int) -> list[Tensor]:
        """Logits [n, C] of a look at a batch, of each pass."""
        images = loaded.augmenter.normalise(images)
        precision = loaded.member.recipe.precision

        def once() -> Tensor:
            with autocast(self.engine.device, precision):
                return in_parts(loaded.model, images).float()

        if not self.mc_dropout:
            return [once()]
        name, device = loaded.member.name, self.engine.device
        return [drop(once, device, name, 0, batch, look, n) for n in range(self.mc_dropout)]

    def _check(self, logits: npt.NDArray[np.float32], member: Member, batch: MicroBatch) -> None:
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            raise UserError(
                f"member {member.name} gives logits that are not finite (sample "
                f"{int(batch.samples[~finite][0]):,}); its weights are no good: leave it out with "
                "--members"
            )

    def _taken_features(self, count: int) -> Features:
        members = []
        for taken in self._features:
            if not taken:  # a batch of unreadable images
                return np.zeros((count, 0), np.float32)
            rows = torch.cat([t.flatten(1).float() for t in taken])
            members.append(rows.view(-1, count, rows.shape[1]).mean(0).cpu().numpy())
            taken.clear()
        return np.concatenate(members, axis=1)

    def statistics(self, ensemble: Ensemble, index: Index) -> Statistics | None:
        """Statistics of an ensemble of these members, on rank 0. Collective.

        No rank holds more logits than those of a batch.
        """
        found = EnsembleStatistics(ensemble)
        with Progress("evaluating", len(index), self.engine) as progress:
            for outputs in self.outputs(index):
                found.add(outputs.logits, labels_of(index, outputs.samples))
                progress.advance(len(outputs.samples))
        return gather_statistics(self.engine, found.statistics, len(index), self.batch)

    def logits(self, index: Index) -> Logits | None:
        """Logits [M, N, C] of all samples on rank 0, in index order; None elsewhere. Collective."""
        found = self.gathered(index)
        return None if found is None else found[0]

    def gathered(self, index: Index) -> tuple[Logits, Features] | None:
        """The same, and features [N, D], of which there are none unless they were asked for."""
        found = []
        with Progress("evaluating", len(index), self.engine) as progress:
            for outputs in self.outputs(index):
                found.append(outputs)
                progress.advance(len(outputs.samples))
        members, classes = len(self.members), self.classes
        width = sum(self._width(loaded) for loaded in self._loaded) if self._features else 0
        rows = [np.zeros((0, members * classes + width), np.float32)]
        for o in found:
            flat = o.logits.swapaxes(0, 1).reshape(-1, members * classes)
            rows.append(flat if o.features is None else np.concatenate([flat, o.features], axis=1))
        on_device = torch.from_numpy(np.concatenate(rows)).to(self.engine.device)
        ordered = gather_in_order(self.engine, on_device, len(index), self.batch)
        if ordered is None:
            return None
        logits, features = np.split(ordered, [members * classes], axis=1)
        return (
            np.ascontiguousarray(logits.reshape(-1, members, classes).swapaxes(0, 1)),
            features,
        )

    def stages(self) -> list[str]:
        """The stages of the first member whose maps timm can take, but for the last one."""
        info = getattr(self._loaded[0].model, "feature_info", None)
        entries = getattr(info, "info", info) or []
        return [entry["module"] for entry in entries][:-1]

    def _width(self, loaded: _Loaded) -> int:
        """How many features a member has: on a rank without a batch, too."""
        try:
            return linear_classifier(loaded.model, WHY)[1].in_features
        except UserError as error:
            raise UserError(f"member {loaded.member.name}: {error}") from None


def _mean_log_probability(logits: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float64]:
    """Logits whose softmax is the mean of probabilities of several looks, [n, C]."""
    total = np.logaddexp.reduce([log_softmax(array) for array in logits], axis=0)
    mean: npt.NDArray[np.float64] = total - np.log(len(logits))
    return mean


def _watch(loaded: _Loaded) -> list[Tensor]:
    """A list that takes what goes into the classifier at each forward pass."""
    found = classifiers(loaded.model)
    if len(found) != 1 or isinstance(found[0], nn.Identity):
        raise UserError(
            f"member {loaded.member.name}: {loaded.member.recipe.model.name} has no one classifier "
            "whose input could be its features; leave out --features"
        )
    taken: list[Tensor] = []
    found[0].register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0].detach()))
    return taken
