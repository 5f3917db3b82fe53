"""The contestants of benchmarks/loader.py: iterators over batches that yield their sizes."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bigbatch.configs.augment import Augment, Crop
from bigbatch.configs.sampling import Uniform
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import BatchPlan, Decoding, MicroBatch
from bigbatch.data.geometry import View
from bigbatch.data.index import open_index
from bigbatch.data.loader import train_batches
from bigbatch.data.order import build_order
from bigbatch.data.read import ShardReader

BATCH, SIZE, SHARDS = 64, 224, 8
SCALE, MEAN, STD = (0.08, 1.0), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def our_batches(folder: Path, workers: int, view: View | None = None) -> Iterator[MicroBatch]:
    index = open_index(folder)
    plan = BatchPlan(BATCH, BATCH, rank=0, world=1, start_step=0, stop_step=10**9)
    decoding = Decoding(SIZE, channels=3, workers=workers, threads=1, view=view)
    return train_batches(index, build_order(Uniform(), index, 0), plan, decoding)


def make_augmenter() -> Augmenter:
    return Augmenter(
        Augment(crop=Crop(scale=SCALE), flip=0.5, mean=MEAN, std=STD),
        image_size=SIZE,
        crop_fraction=1.0,
        classes=10,
        seed=0,
        device=torch.device("cpu"),
    )


def bigbatch_float(folder: Path, workers: int) -> Iterator[int]:
    augmenter = make_augmenter()
    for batch in our_batches(folder, workers, augmenter.view):
        images, _ = augmenter.train(batch)
        yield len(images)


def bigbatch_uint8(folder: Path, workers: int) -> Iterator[int]:
    for batch in our_batches(folder, workers):
        yield len(batch.sizes)


def torchvision_transform() -> Callable[[Image.Image], torch.Tensor]:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def webdataset_float(folder: Path, workers: int) -> Iterator[int]:
    import webdataset as wds

    urls = [str(p) for p in sorted(folder.glob("*.tar"))]
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls), resampled=True)
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple("jpg", "cls")
        .map_tuple(torchvision_transform(), int)
        .batched(BATCH, partial=False)
    )
    for images, _ in wds.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield len(images)


def timm_float(folder: Path, workers: int) -> Iterator[int]:
    from timm.data import create_dataset, create_loader

    split = f"{{000000..{SHARDS - 1:06d}}}.tar|{len(open_index(folder))}"
    options = {"is_training": True, "batch_size": BATCH}
    dataset = create_dataset("wds/", str(folder), split, **options)
    loader = create_loader(
        dataset,
        input_size=(3, SIZE, SIZE),
        scale=SCALE,
        color_jitter=0.0,
        mean=tuple(MEAN),
        std=tuple(STD),
        num_workers=workers,
        use_prefetcher=False,
        device=torch.device("cpu"),
        **options,
    )
    while True:
        for images, _ in loader:
            yield len(images)


def streaming_float(folder: Path, workers: int) -> Iterator[int]:
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()  # of the round before, which left it behind

    local = folder.parent / f"{folder.name}-mds"
    if not local.exists():
        with MDSWriter(out=str(local), columns={"jpg": "bytes", "cls": "int"}) as writer:
            for data in encoded(folder):
                writer.write({"jpg": data, "cls": 0})
    transform = torchvision_transform()

    class Photos(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")), sample["cls"]

    dataset = Photos(local=str(local), shuffle=True, batch_size=BATCH)
    loader = DataLoader(
        dataset, BATCH, num_workers=workers, drop_last=True, persistent_workers=True
    )
    while True:
        for images, _ in loader:
            yield len(images)


CONTESTANTS: dict[str, Callable[[Path, int], Iterator[int]]] = {
    "bigbatch, float": bigbatch_float,
    "webdataset, float": webdataset_float,
    "timm, float": timm_float,
    "mosaicml-streaming, float": streaming_float,
    "bigbatch, uint8": bigbatch_uint8,
}


def encoded(folder: Path) -> list[bytes]:
    """The images of all shards, in index order."""
    index = open_index(folder)
    reader = ShardReader([folder / file.name for file in index.shards])
    columns = (index.shard, index.offset, index.size, index.crc)
    return [reader.read(*place) for place in zip(*(c.tolist() for c in columns), strict=True)]
