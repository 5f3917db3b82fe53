"""Device-side augmentation: one warp, colour, mixup and normalisation for a micro-batch.

Every parameter is drawn on the host from (seed, step, micro-batch), so the same images
come out on any rank and any device. Geometry is one resampling, however many maps are
composed: it uses torch's grid_sample rather than kornia's warp_affine, which inverts each
matrix on the device and waits for the result. Colour is kornia's. On a CPU, plain crops,
evaluation's among them, take the shorter way of data/augment/crop.py.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.configs.augment import Augment
from bigbatch.data import geometry
from bigbatch.data.augment.colour import jitter
from bigbatch.data.augment.crop import Memory, crop_resize, nearly_whole
from bigbatch.data.augment.mix import mixup
from bigbatch.data.batch import MicroBatch

# Above this many source pixels per output pixel, bilinear sampling skips pixels.
_MAX_SHRINK = 1.3


class Augmenter:
    """Turns canvases of uint8 into normalised float images [B, C, out, out] on a device.

    `layout` is the memory order of what `train` and `evaluate` give.
    """

    def __init__(
        self,
        augment: Augment,
        *,
        image_size: int,
        crop_fraction: float,
        classes: int,
        seed: int,
        device: torch.device,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.augment = augment
        self.image_size = image_size
        self.view = geometry.View(
            image_size, crop_fraction, augment.crop, augment.affine, augment.flip, seed
        )
        self.eval_view = geometry.View(image_size, crop_fraction)
        self._memory = Memory()
        self.classes = classes
        self.seed = seed
        self.device = device
        self.layout = layout
        self.mean = torch.tensor(augment.mean, device=device)
        self.std = torch.tensor(augment.std, device=device)

    def train(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Augmented images [B, C, out, out] and soft targets [B, classes]."""
        images, key = self.images(batch), (self.seed, batch.step, batch.index)
        targets = F.one_hot(self._put(batch.labels), self.classes).float()
        if self.augment.mixup > 0:
            images, targets = mixup(images, targets, self.augment.mixup, *key)
        return self.normalise(images), targets

    def images(self, batch: MicroBatch) -> Tensor:
        """Augmented images in [0, 1], before mixup and normalisation."""
        images = self._see(batch, self.view)
        if self.augment.jitter is not None:
            images = jitter(images, self.augment.jitter, self.seed, batch.step, batch.index)
        return images

    def evaluate(self, batch: MicroBatch) -> Tensor:
        """Centre crops, normalised: nothing random."""
        return self.normalise(self._see(batch, self.eval_view))

    def _see(self, batch: MicroBatch, view: geometry.View) -> Tensor:
        """What the view shows of the images: [B, C, out, out] in [0, 1]."""
        key, frames = (batch.step, batch.index), batch.frames
        sizes = np.stack([frames["full_height"], frames["full_width"]], 1)
        boxes = geometry.into_frames(view.boxes(sizes, *key), frames)
        warps = view.warps(len(sizes), *key)
        on_host = self.device.type == "cpu" and view.affine is None
        if not on_host or (view.crop is None and not nearly_whole(boxes)):
            return self._warp(batch, geometry.box_matrices(boxes, view.out) @ warps)
        return crop_resize(batch, boxes, view.out, warps[:, 0, 0] < 0, self._memory)

    def normalise(self, images: Tensor) -> Tensor:
        """Overwrites `images`: on a CPU, fresh memory costs more than the arithmetic."""
        images = images.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])
        return images.contiguous(memory_format=self.layout)

    def _warp(self, batch: MicroBatch, matrices: geometry.Matrices) -> Tensor:
        canvas = batch.canvas(self.device)
        height, width = canvas.shape[1:3]
        theta, shrink = geometry.to_theta(matrices, self.image_size, (height, width))
        # Antialiasing: sample a finer grid, then average. 1 in almost every training batch.
        finer = max(1, round(shrink)) if shrink > _MAX_SHRINK else 1
        out = self.image_size * finer
        canvas = canvas.permute(0, 3, 1, 2).float().div_(255)
        grid = F.affine_grid(
            self._put(torch.from_numpy(theta)),
            [len(canvas), canvas.shape[1], out, out],
            align_corners=False,
        )
        # Beyond an image's own edge (which lies inside the canvas) its edge is repeated.
        extent = np.array([width, height])
        last = torch.from_numpy((2 * batch.sizes.numpy()[:, ::-1] - 1) / extent - 1).float()
        first = torch.tensor([1 / width - 1, 1 / height - 1])
        grid = torch.maximum(grid, self._put(first))
        grid = torch.minimum(grid, self._put(last)[:, None, None])
        images = F.grid_sample(canvas, grid, mode="bilinear", align_corners=False)
        return F.avg_pool2d(images, finer) if finer > 1 else images

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def contact_sheet(images: Tensor, columns: int = 8) -> np.ndarray:
    """Images [B, C, H, W] in [0, 1] as one uint8 picture [rows * H, columns * W, C]."""
    rows: Sequence[Tensor] = images.split(columns)
    full = [r for r in rows if len(r) == columns] or list(rows[:1])
    sheet = torch.cat([torch.cat(list(r), dim=2) for r in full], dim=1)
    return (sheet.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
