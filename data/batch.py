"""Micro-batches: which ones a rank makes and how, and what one holds on its way to the device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bigbatch.configs.timeline import Timeline
from bigbatch.data.geometry import Frames, View, whole_frames
from bigbatch.data.order import Positions


@dataclass(frozen=True)
class BatchPlan:
    """Which micro-batches a rank makes: rank, rank + world, ... of steps start to stop."""

    global_batch: int | Timeline  # images of a step, on all ranks together
    micro_batch: int  # images of a micro-batch
    rank: int
    world: int
    start_step: int
    stop_step: int  # the first one that is not made

    @property
    def numbers(self) -> range:
        """The rank's micro-batches in a step, the largest where they differ."""
        batch = self.global_batch
        most = batch if isinstance(batch, int) else max(batch.batches)
        return range(self.rank, most // self.micro_batch, self.world)

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(step, micro-batch, position of its first sample) of each, in order."""
        size, batch = self.micro_batch, self.global_batch
        line = Timeline.constant(batch, 1) if isinstance(batch, int) else batch
        for step in range(self.start_step, self.stop_step):
            first = line.first(step)
            for number in range(self.rank, line.batch(step) // size, self.world):
                yield step, number, first + number * size


@dataclass(frozen=True)
class Decoding:
    """How samples become pixels in the trainer's memory.

    What a micro-batch holds depends on neither `workers`, `threads` nor `pin_memory`, but for what
    is damaged after a worker has seen it (docs/loading.md, "Bad samples"). A stream takes no notice
    of `workers` and `view`, an evaluation of `bad_samples` and `journal`.
    """

    image_size: int  # the longer side of what a model sees
    channels: int
    workers: int  # processes; 0: this one
    threads: int  # in each
    bad_samples: int = 0  # how many unreadable ones are substituted or passed over
    journal: Path | None = None  # where these are noted
    pin_memory: bool = False  # page-locked, for copies to a GPU
    view: View | None = None  # what will be seen of each image; without it, maybe all


@dataclass(frozen=True)
class MicroBatch:
    """Decoded samples of one micro-batch.

    Images are packed, one after another in rows of pixels, and `canvas` lays them out: so
    each byte crosses to the device once, and no padding does.
    """

    step: int
    index: int  # of the micro-batch in its step
    samples: Positions  # int64 [B]
    labels: Tensor  # int64 [B]
    pixels: Tensor  # uint8 [sum of height * width * channels]
    sizes: Tensor  # int32 [B, 2]: height, width
    channels: int
    bad: tuple[dict[str, Any], ...] = ()  # journal entries: what was substituted, and why
    slow_read: tuple[int, float] | None = None  # shard that took longest to read, seconds
    stored: Frames | None = None  # [B], which part of each image this is; None: all of it
    targets: Tensor | None = None  # float32 [B, K], as they stand in the shards

    @property
    def frames(self) -> Frames:
        """Where these pixels lie in the full images, [B]."""
        return whole_frames(self.sizes.numpy()) if self.stored is None else self.stored

    def images(self, device: torch.device | None = None) -> list[Tensor]:
        """Each image on `device`: views uint8 [height, width, C] of the pixels."""
        pixels = self.pixels.to(device or self.pixels.device, non_blocking=True)
        parts = pixels.split((self.sizes.prod(1) * self.channels).tolist())
        sizes = self.sizes.tolist()
        return [p.view(h, w, self.channels) for p, (h, w) in zip(parts, sizes, strict=True)]

    def canvas(self, device: torch.device | None = None) -> Tensor:
        """Images on `device`, each in the top left corner of a canvas: uint8 [B, H, W, C].

        H and W are the largest height and width; the canvas is 0 beyond each image.
        """
        device = device or self.pixels.device
        largest = self.sizes.amax(0)
        shape = (len(self.sizes), *largest.tolist(), self.channels)
        if bool((self.sizes == largest).all()):
            return self.pixels.to(device, non_blocking=True).view(shape)
        canvas = torch.zeros(shape, dtype=torch.uint8, device=device)
        for place, image in zip(canvas, self.images(device), strict=True):
            place[: image.shape[0], : image.shape[1]] = image
        return canvas

    def part(self, rows: npt.NDArray[np.int64]) -> "MicroBatch":
        """The samples at these places, with copies of their pixels."""
        pixels = self.pixels.split((self.sizes.prod(1) * self.channels).tolist())
        places = torch.from_numpy(rows).to(self.labels.device)
        return replace(
            self,
            samples=self.samples[rows],
            labels=self.labels[places],
            targets=None if self.targets is None else self.targets[places],
            pixels=torch.cat([pixels[row] for row in rows.tolist()]),
            sizes=self.sizes[torch.from_numpy(rows)],
            bad=(),
            stored=None if self.stored is None else self.stored[rows],
        )

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`, but for sizes, which the host needs."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        return replace(
            self,
            pixels=change(self.pixels),
            labels=change(self.labels),
            targets=None if self.targets is None else change(self.targets),
        )
