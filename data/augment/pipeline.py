"""Device-side augmentation: geometry, then an ordered list of operations, then normalisation.

Every parameter is drawn on the host from (seed, step, micro-batch) and a name, so the same
images come out on any rank and any device, and an operation that is added leaves the draws
of the others alone. Geometry is one resampling, however many maps are composed: on a device
it is data/augment/warp.py; on a CPU, plain crops, evaluation's among them, take the shorter
way of data/augment/crop.py. All of it is float32, also where the caller is under autocast.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bigbatch.configs.augment import Augment
from bigbatch.configs.size import Size, height_width
from bigbatch.data import geometry
from bigbatch.data.augment import colour, mix, ops
from bigbatch.data.augment.crop import crop_resize, nearly_whole
from bigbatch.data.augment.memory import Memory
from bigbatch.data.augment.operation import Draws, Mixing, Operation, few_of, per_image, to_device
from bigbatch.data.augment.warp import finer_grids, warp
from bigbatch.data.batch import MicroBatch

# Names whose draws are taken: the geometry's, and those of mixup's partners. An operation of
# one of these names counts as a second one.
_TAKEN = ("crop", "affine", "flip", "partner")


class Augmenter:
    """Turns canvases of uint8 into normalised float images [B, C, *out] on a device.

    `eval_size` is that of `evaluate`, by default `image_size`; `growth` are those of `train` by
    step, by default `image_size` throughout; `strengths` [classes] are the shares of images that
    operations on pixels change, by default all. `memory_format` is that of what both give.
    `scaling` are mean and std of the numbers that are learned in place of labels. With `views`,
    `train` gives three images of each sample, [3B, C, *out]: all without the last operation, then
    all with it, then all with it once more, by the draws that a second one of its name would have.
    """

    def __init__(
        self,
        augment: Augment,
        *,
        image_size: Size,
        crop_fraction: float,
        squash: bool = False,
        classes: int,
        seed: int,
        device: torch.device,
        eval_size: Size | None = None,
        growth: geometry.Growth = (),
        strengths: Sequence[float] | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        views: bool = False,
        scaling: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        self.mean = torch.tensor(augment.pixel_mean, device=device)
        self.std = torch.tensor(augment.pixel_std, device=device)
        seen = Counter(_TAKEN)
        self.view = geometry.View(
            image_size,
            crop_fraction,
            augment.crop,
            augment.affine,
            augment.flip,
            seed,
            maps=ops.maps_of(augment, seen),
            border=augment.border,
            squash=squash,
            growth=growth,
        )
        self.eval_view = geometry.View(eval_size or image_size, crop_fraction, squash=squash)
        self._memory, mixed = Memory(), Memory()
        pixels = [*colour.operations(augment), *ops.operations(augment, self.mean, self.std)]
        self._operations = _numbered(pixels, seen)
        self._mixings = _numbered(mix.operations(augment, mixed), seen)
        self._strengths = None if strengths is None else torch.tensor(strengths, device=device)
        self.classes = classes
        self.seed = seed
        self.device = device
        self.memory_format = memory_format
        self._views = views
        self._scaling: tuple[Tensor, Tensor] | None = None
        if scaling is not None:
            mean, std = (torch.tensor(x, dtype=torch.float64, device=device) for x in scaling)
            self._scaling = mean, std

    def train(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Augmented images [B, C, *out] and soft targets [B, classes], or numbers [B, K]."""
        with self._float32():
            images = self._three(batch) if self._views else self.images(batch)
            targets = self.targets(batch)
            for mixing, occurrence in self._mixings:
                draws = self._draws(batch, mixing.name, occurrence)
                images, targets = mixing.apply(images, targets, draws)
            return self.normalise(images), targets

    def targets(self, batch: MicroBatch) -> Tensor:
        """What is learned of each sample, before it is mixed: its label's row of the unit matrix
        [B, classes], or its numbers less their mean, over their std, [B, K]."""
        if self._scaling is None:
            labels = batch.labels.to(self.device, non_blocking=True)
            # F.one_hot makes them of int64 first, twice the memory.
            targets = torch.zeros(len(labels), self.classes, device=self.device)
            return targets.scatter_(1, labels[:, None].long(), 1.0)
        assert batch.targets is not None, "the start looks at the index"
        mean, std = self._scaling
        return ((batch.targets.to(self.device, torch.float64) - mean) / std).float()

    def shares(self, batch: MicroBatch) -> Tensor:
        """How much of each image that `train` gives comes from which one: [B, B], rows sum to 1."""
        count = len(batch.samples)
        shares = torch.eye(count, device=self.device)
        size = height_width(self.view.at(batch.step).out)
        for mixing, occurrence in self._mixings:
            images = torch.zeros(count, 1, *size, device=self.device)
            draws = self._draws(batch, mixing.name, occurrence)
            shares = mixing.apply(images, shares, draws)[1]
        return shares

    def images(self, batch: MicroBatch) -> Tensor:
        """Augmented images in [0, 1], before they are mixed and normalised."""
        with self._float32():
            return self._changed(batch, self._operations)

    def _changed(self, batch: MicroBatch, operations: Sequence[tuple[Operation, int]]) -> Tensor:
        images = self.crop_and_warp(batch, self.view)
        for operation, occurrence in operations:
            images = self._change(images, batch, operation, occurrence)
        return images

    def _three(self, batch: MicroBatch) -> Tensor:
        *earlier, (last, occurrence) = self._operations
        plain = self._changed(batch, earlier)
        changed = [self._change(plain.clone(), batch, last, occurrence + i) for i in range(2)]
        return torch.cat([plain, *changed])

    def _change(
        self, images: Tensor, batch: MicroBatch, operation: Operation, occurrence: int
    ) -> Tensor:
        """An operation on images, overwritten; on as many of a class as its strength says.

        Who takes part is a draw of its own: an image that does is changed as without strengths.
        """
        draws = self._draws(batch, operation.name, occurrence)
        if self._strengths is None:
            return operation.apply(images, draws)
        u = to_device(
            replace(draws, name=f"{draws.name} strength").uniforms(len(images)), self.device
        )
        labels = batch.labels.to(self.device, non_blocking=True)
        takes_part = u < self._strengths[labels]
        before = images.clone()
        return torch.where(per_image(takes_part), operation.apply(images, draws), before)

    def each(self, whole: MicroBatch, batch: MicroBatch) -> Iterator[tuple[str, Tensor]]:
        """Names and images in [0, 1]: what evaluation sees, what each operation alone makes of it
        by its draws in training, and what training sees.

        `batch` is stored for the view of training; `whole` has the same images, all of them.
        """
        with self._float32():
            yield "evaluation", self.crop_and_warp(whole, self.eval_view)
            view = self.view.at(batch.step)
            plain = self.crop_and_warp(whole, replace(self.eval_view, out=view.out))
            none = plain.new_zeros((len(plain), 1))  # targets, of which nothing is shown
            bare = replace(view, crop=None, affine=None, flip=0.0, maps=())
            alone = {
                "crop": view.crop and replace(bare, crop=view.crop),
                "affine": view.affine and replace(bare, affine=view.affine),
                "flip": view.flip and replace(bare, flip=view.flip),
            }
            parts = [(name, part) for name, part in alone.items() if part]
            parts += [(one.name, replace(bare, maps=(one,))) for one in view.maps]
            for name, part in parts:
                yield name, self.crop_and_warp(whole, part)
            for operation, place in self._operations:
                yield operation.name, self._change(plain.clone(), batch, operation, place)
            for mixing, place in self._mixings:
                draws = self._draws(batch, mixing.name, place)
                yield mixing.name, mixing.apply(plain.clone(), none, draws)[0]
            images = self.images(batch)
            for mixing, place in self._mixings:
                draws = self._draws(batch, mixing.name, place)
                images, _ = mixing.apply(images, none, draws)
            yield "training", images

    def evaluate(self, batch: MicroBatch) -> Tensor:
        """Centre crops, normalised: nothing random."""
        with self._float32():
            return self.normalise(self.crop_and_warp(batch, self.eval_view))

    def crop_and_warp(self, batch: MicroBatch, view: geometry.View) -> Tensor:
        """What the view shows of the images: [B, C, *out] in [0, 1]. Not under autocast.

        A micro-batch of training is resampled in one way. Where nothing is random, each image
        is as it would be alone, whatever the others of its batch need.
        """
        key, frames, view = (batch.step, batch.index), batch.frames, view.at(batch.step)
        sizes = np.stack([frames["full_height"], frames["full_width"]], 1)
        boxes = geometry.into_frames(view.boxes(sizes, *key), frames)
        matrices = geometry.box_matrices(boxes, view.out) @ view.warps(len(sizes), *key)
        grids = finer_grids(matrices, view.out)  # [B]; 0 is to stand for a crop on the host
        plain = np.zeros(len(boxes), bool)
        if self.device.type == "cpu" and view.affine is None and not view.maps:
            plain = nearly_whole(boxes) | (view.crop is not None)
        if view.is_random:
            grids[:] = 0 if plain.all() else grids.max(initial=1)
        else:
            grids[plain] = 0
        ways = np.unique(grids).tolist()
        if len(ways) == 1:
            return self._resample(batch, boxes, matrices, view, on_host=ways[0] == 0)
        shape = len(boxes), batch.channels, *height_width(view.out)
        images = torch.empty(shape, device=self.device)
        for way in ways:
            rows = np.flatnonzero(grids == way)
            images[torch.from_numpy(rows).to(self.device)] = self._resample(
                batch.part(rows), boxes[rows], matrices[rows], view, on_host=way == 0
            )
        return images

    def _resample(
        self,
        batch: MicroBatch,
        boxes: geometry.Boxes,
        matrices: geometry.Matrices,
        view: geometry.View,
        *,
        on_host: bool,
    ) -> Tensor:
        if on_host:
            return crop_resize(batch, boxes, view.out, matrices[:, 0, 0] < 0, self._memory)
        fill = self.mean if view.border == "mean" else torch.zeros_like(self.mean)
        return warp(batch, matrices, view.out, self.device, view.border, fill)

    def normalise(self, images: Tensor) -> Tensor:
        """Overwrites `images`: on a CPU, fresh memory costs more than the arithmetic."""
        for some in images.split(few_of(images)):
            some.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])
        return images.contiguous(memory_format=self.memory_format)

    def _draws(self, batch: MicroBatch, name: str, occurrence: int) -> Draws:
        return Draws(self.seed, batch.step, batch.index, name, occurrence)

    def _float32(self) -> torch.autocast:
        """The arithmetic of pixels whatever the caller's: half of it would blur their places."""
        return torch.autocast(self.device.type, enabled=False)


Named = TypeVar("Named", Operation, Mixing)


def _numbered(operations: Iterable[Named], seen: Counter[str]) -> list[tuple[Named, int]]:
    """Each with how many of its name stand before it, by `seen`, which is counted on."""
    numbered = []
    for operation in operations:
        numbered.append((operation, seen[operation.name]))
        seen[operation.name] += 1
    return numbered


def contact_sheet(images: Tensor, columns: int = 8) -> np.ndarray:
    """Images [B, C, H, W] in [0, 1] as one uint8 picture [rows * H, columns * W, C]."""
    rows: Sequence[Tensor] = images.split(columns)
    full = [r for r in rows if len(r) == columns] or list(rows[:1])
    sheet = torch.cat([torch.cat(list(r), dim=2) for r in full], dim=1)
    return (sheet.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
