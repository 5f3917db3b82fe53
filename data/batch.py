"""One micro-batch: decoded samples on their way to the device."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigbatch.data.geometry import Frames, whole_frames
from bigbatch.data.order import Positions


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

    def to(self, device: torch.device) -> "MicroBatch":
        """The same with pixels and labels on `device`; sizes stay, which the host needs."""
        pixels = self.pixels.to(device, non_blocking=True)
        return replace(self, pixels=pixels, labels=self.labels.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        return replace(self, pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory())
