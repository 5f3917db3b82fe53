"""A teacher: what the members of an ensemble say, together, of a student's micro-batches.

Members see what the student sees: the same crops, flips, colours and mixtures, drawn by the
student's keys, at the size that each was trained on, since these are views of training, and
normalised by their own mean and std. A micro-batch is the unit here too, so the outputs follow from
(recipe, step, micro-batch), whoever computes them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.notices import notice
from bigbatch.configs.schema import Recipe
from bigbatch.configs.size import largest
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import MicroBatch
from bigbatch.trainers.distillation.kept import KeptOutputs, OutputType
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.ensemble.folder import Ensemble
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.losses.hint import Watched, attention
from bigbatch.trainers.models.build import choose_memory_format

# Of a probability that came out as 0; its logarithm is a finite float16, too.
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, eq=False)
class _Alike:
    """Members, by number, that are given the same pixels."""

    augmenter: Augmenter
    places: list[int]


class Teacher:
    """An ensemble on this rank's device, in eval mode, for the micro-batches of one recipe.

    `hint` is a layer of each member, and the grid to which its attention is averaged. `hash` is
    over all that decides what members say; outputs, of `width` numbers an image, are rounded to
    `kind`. Images have to be decoded for models of `decoded_size`, so that nobody lacks pixels.
    `strengths` are those of the student's augmentation, by class. `computed` counts the
    micro-batches that went through the members; the others were read. Members are loaded at the
    first one.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        recipe: Recipe,
        engine: Engine,
        kind: OutputType = "float32",
        hint: tuple[str, int] | None = None,
        strengths: Sequence[float] | None = None,
    ) -> None:
        self.ensemble = ensemble
        self.hash = teacher_hash(ensemble)
        self.kind = kind
        self.hint = hint
        self.width = len(ensemble.classes) + (hint[1] ** 2 if hint is not None else 0)
        sizes = [recipe.data.image_size, *(m.recipe.data.image_size for m in ensemble.members)]
        self.decoded_size = largest(sizes)
        self.computed = 0
        self._engine = engine
        self._kept: KeptOutputs | None = None
        self._models: list[nn.Module] = []
        self._watched: list[Watched] = []
        alike: dict[Any, list[int]] = {}
        for place, member in enumerate(ensemble.members):
            mean, std = member.recipe.augment.pixel_mean, member.recipe.augment.pixel_std
            order = choose_memory_format(member.recipe.model, engine.device)
            key = member.recipe.data.image_size, tuple(mean), tuple(std), order
            alike.setdefault(key, []).append(place)
        self._alike = [
            _Alike(
                Augmenter(
                    recipe.augment.model_copy(update={"mean": list(mean), "std": list(std)}),
                    image_size=size,
                    crop_fraction=recipe.evaluate.crop_fraction,
                    squash=recipe.evaluate.squash,
                    strengths=strengths,
                    classes=len(ensemble.classes),
                    seed=recipe.seed,
                    device=engine.device,
                    memory_format=order,
                ),
                places,
            )
            for (size, mean, std, order), places in alike.items()
        ]

    def described(self) -> dict[str, Any]:
        """Who teaches, as plain values for the run's record."""
        names = [member.name for member in self.ensemble.members]
        combined = self.ensemble.combination.method
        return {"members": names, "combined": combined, "teacher_hash": self.hash}

    def keep(self, kept: KeptOutputs) -> None:
        """Read what `kept` holds rather than compute it, and add to it what it lacks."""
        self._kept = kept

    def outputs(self, batch: MicroBatch) -> Tensor:
        """Of each image of a micro-batch as the student sees it: float32 [B, width], on the device.

        The logarithm of the combined probabilities [B, C], and behind it the members' mean
        attention [B, grid * grid] where there is a hint. Draws no random number of torch's;
        loading the members does. Raises UserError, which names the member.
        """
        outputs = self._read(batch)
        if outputs is None:
            outputs = self._compute(batch)
            self.computed += 1
            self._write(batch, outputs)
        return torch.from_numpy(outputs.astype(np.float32)).to(self._engine.device)

    @torch.no_grad()
    def _compute(self, batch: MicroBatch) -> npt.NDArray[Any]:
        members = self.ensemble.members
        if not self._models:
            self._load()
        shape = len(members), len(batch.samples), len(self.ensemble.classes)
        logits = np.empty(shape, np.float32)
        looks = np.empty((*shape[:2], self.width - shape[2]), np.float32)
        for alike in self._alike:
            images, _ = alike.augmenter.train(batch)
            for place in alike.places:
                with self._engine.autocast():
                    output = self._models[place](images)
                logits[place] = output.float().cpu().numpy()
                if not np.isfinite(logits[place]).all():
                    raise UserError(
                        f"teacher {members[place].name} gives logits that are not finite (step "
                        f"{batch.step}, micro-batch {batch.index}); its weights are no good: leave "
                        "it out by distill.members, or choose another teacher"
                    )
                if self.hint is not None:
                    features = self._watched[place].take()
                    looks[place] = attention(features, self.hint[1]).cpu().numpy()
        log_probabilities = np.log(np.maximum(self.ensemble.combination.apply(logits), _TINY))
        mean = looks.mean(0, dtype=np.float64)
        return np.concatenate([log_probabilities, mean], 1).astype(self.kind)

    def _load(self) -> None:
        device = self._engine.device
        for member in self.ensemble.members:
            model = member.build(device)
            self._models.append(model)
            if self.hint is not None:
                whose = f"teacher {member.name}"
                self._watched.append(Watched(model, self.hint[0], whose))

    def _read(self, batch: MicroBatch) -> npt.NDArray[Any] | None:
        if self._kept is None:
            return None
        try:
            return self._kept.read(batch.step, batch.index, batch.samples)
        except OSError as error:
            self._lose(error)
            return None

    def _write(self, batch: MicroBatch, outputs: npt.NDArray[Any]) -> None:
        if self._kept is not None:
            try:
                self._kept.write(batch.step, batch.index, batch.samples, outputs)
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        """Outputs that cannot be kept cost time and no exactness: no run ends for them."""
        self._kept = None
        notice(f"the teacher's outputs are kept no longer, but computed: {error}")


def teacher_hash(ensemble: Ensemble) -> str:
    """32 hex digits over all that decides what an ensemble says: SHA-256 of weights included."""
    members = [
        {
            "weights": _sha256(member),
            "model": member.recipe.model.model_dump(include={"name", "stem", "options"})
            | member.recipe.model.network(),
            "mean": member.recipe.augment.pixel_mean,
            "std": member.recipe.augment.pixel_std,
            "image_size": member.recipe.data.image_size,
            "classes": member.classes,
        }
        for member in ensemble.members
    ]
    tree = {"members": members, "combination": ensemble.combination.to_json()}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:32]


def _sha256(member: Member) -> str:
    try:
        with member.weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"teacher {member.name}: {member.weights} cannot be read ({error.strerror}); put it "
            "back: also a teacher whose outputs are all kept is known by its weights"
        ) from None
