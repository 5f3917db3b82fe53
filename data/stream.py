"""Training on tars that cannot be indexed: pipes, and streams of unknown length.

What a stream holds is known only by reading it, so none of the promises of data/order.py
hold here: samples are drawn with replacement, shard by shard ("resampling"), each rank for
itself; an epoch is a number of samples and no sample's turn; other world sizes give other
batches, and a resumed run goes on with fresh draws. Index the tars wherever they can be.

The webdataset package resamples, and groups members to samples. Its decoders are not used,
because they unpickle: members are read by an allow-list of extensions, and others are never
looked at. Nor is its opener, which hands `pipe:` to a shell, nor its reader, which takes memory
for a member of any size.
"""

import os
import random
import re
import shlex
import subprocess
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from braceexpand import braceexpand
from webdataset.shardlists import ResampledShards
from webdataset.tariterators import group_by_keys

from bigbatch.configs.errors import UserError
from bigbatch.configs.stream import refuse_commands
from bigbatch.data.batch import BatchPlan, Decoding, MicroBatch
from bigbatch.data.decode import MAX_BYTES, Pixels, decode
from bigbatch.data.journal import append
from bigbatch.data.loader import pinned
from bigbatch.data.read import BadSample
from bigbatch.data.rng import key64
from bigbatch.data.samples import IMAGE_EXTENSIONS, class_number
from bigbatch.data.staging import file_system, is_url

_SHUFFLED = 2_000  # samples of which one is drawn, ...
_SHUFFLED_BYTES = 1 << 30  # ... or fewer, of this many encoded bytes
_MAX_EXTENDED_HEADER, _MAX_TEXT = 1 << 20, 1 << 20
_TEXTS = (".cls", ".json")
_META = re.compile(r"__[^/]*__($|/)")  # what WebDataset sets aside
_ALLOWED = IMAGE_EXTENSIONS | {"cls", "json"}


class Encoded(NamedTuple):
    """A sample as it stands in its archive."""

    key: str
    image: bytes
    label: int
    shard: str  # its URL


class _Faults:
    """Notes what cannot be read, up to a limit."""

    def __init__(self, limit: int, journal: Path | None = None, step: int = 0) -> None:
        self.limit, self.journal, self.step = limit, journal, step
        self.count = 0
        # Of the shard that is being read: its URL, members looked at, whether it broke.
        self.shard, self.members, self.broken = "", 0, False

    def __call__(self, error: Exception, key: str | None = None, shard: str | None = None) -> bool:
        """webdataset's handler: whether to go on."""
        if isinstance(error, UserError | MemoryError):
            raise error
        self.count += 1
        self.broken |= key is None
        shard = shard or self.shard
        # webdataset hangs the open file and the URL onto an error's arguments.
        reason = str(error if isinstance(error, OSError) else error.args[0])
        entry = {"step": self.step, "key": key, "shard": shard, "reason": reason}
        append(self.journal, [entry])
        if self.count > self.limit:
            name = "" if key is None else f", sample {key!r}"
            raise UserError(
                f"{self.count} samples or shards of a stream could not be read, the last one in "
                f"{shard}{name}: {reason}; data.bad_samples allows {self.limit}. Repair them, or "
                "raise the limit"
            ) from error
        return True


def stream_samples(
    urls: Sequence[str], *, seed: int, part: int, bad_samples: int
) -> Iterator[Encoded]:
    """Samples of random shards, without end.

    `urls` are paths, URLs of fsspec, or `pipe:COMMAND`, whose output is a tar; the command is
    split into arguments as a shell would, but no shell runs it. {000..099} in one stands for
    a hundred. `part` tells streams of one seed apart, such as those of ranks. Shards and
    samples that cannot be read are passed over; more than `bad_samples` raise UserError.
    """
    return _samples(urls, seed, part, _Faults(bad_samples))


def _samples(urls: Sequence[str], seed: int, part: int, faults: _Faults) -> Iterator[Encoded]:
    try:
        every = [url for given in urls for url in braceexpand(given, escape=False)]
    except ValueError as error:
        raise UserError(f"stream {', '.join(urls)}: {error}; close each brace") from None
    if not every:
        raise UserError("a stream needs at least one URL")
    shards = ResampledShards(
        every, seed=key64(seed, part, "shards"), worker_seed=lambda: 0, deterministic=True
    )

    def allowed(name: str) -> bool:
        right = name.rpartition("/")[2].partition(".")[2].lower() in _ALLOWED
        faults.members += right
        return right

    groups = group_by_keys(_members(_opened(shards, faults), allowed, faults), handler=faults)
    yield from _mixed(_labelled(groups, faults), key64(seed, part, "samples"))


def stream_batches(
    urls: Sequence[str], plan: BatchPlan, decoding: Decoding, *, classes: int, seed: int
) -> Iterator[MicroBatch]:
    """The plan's micro-batches; this process decodes them, with `decoding.threads` threads.

    They are filled from the rank's own stream, which starts anew, with other draws, at each
    `start_step`. `samples` numbers its draws. Labels must be below `classes`.
    """
    size, channels = plan.micro_batch, decoding.channels
    faults = _Faults(decoding.bad_samples, decoding.journal, plan.start_step)
    stream = _samples(urls, key64(seed, plan.start_step, "stream"), plan.rank, faults)

    def pixels(sample: Encoded) -> Pixels:
        if sample.label >= classes:
            raise BadSample(f"label {sample.label} of {classes} classes")
        if len(sample.image) > MAX_BYTES:
            raise BadSample(f"{len(sample.image):,} encoded bytes")
        return decode(sample.image, image_size=decoding.image_size, channels=channels)

    def decoded() -> Iterator[tuple[Encoded, Pixels]]:
        with ThreadPoolExecutor(decoding.threads) as pool:
            coming: deque[tuple[Encoded, Future[Pixels]]] = deque()
            for sample in stream:
                coming.append((sample, pool.submit(pixels, sample)))
                if len(coming) <= size:
                    continue
                first, image = coming.popleft()
                try:
                    yield first, image.result()
                except BadSample as error:
                    faults(error, first.key, first.shard)

    def batches() -> Iterator[MicroBatch]:
        images, drawn = decoded(), 0
        for step, number, _ in plan.places():
            faults.step = step
            some = [next(images) for _ in range(size)]
            yield MicroBatch(
                step=step,
                index=number,
                samples=np.arange(drawn, drawn + size, dtype=np.int64),
                labels=torch.tensor([sample.label for sample, _ in some]),
                pixels=torch.from_numpy(np.concatenate([image.ravel() for _, image in some])),
                sizes=torch.tensor([image.shape[:2] for _, image in some], dtype=torch.int32),
                channels=channels,
            )
            drawn += size

    return pinned(batches()) if decoding.pin_memory else batches()


class _Header(tarfile.TarInfo):
    """A header whose extensions are of a size that they can have: tarfile reads them whole."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        if self.type in b"xgLKX" and self.size > _MAX_EXTENDED_HEADER:
            raise tarfile.ReadError(
                f"an extended header of {self.size:,} bytes is not plausible (at most "
                f"{_MAX_EXTENDED_HEADER:,})"
            )
        return super()._proc_member(archive)  # type: ignore[misc]


def _members(
    shards: Iterator[dict[str, Any]], allowed: Callable[[str], bool], faults: _Faults
) -> Iterator[dict[str, Any]]:
    """The allowed members of each shard as webdataset groups them; {} ends a shard.

    In place of the bytes of one that is larger than any that are decoded stands its size: a small
    compressed archive may hold any number of gigabytes.
    """
    for shard in shards:
        try:
            with tarfile.open(fileobj=shard["stream"], mode="r|*", tarinfo=_Header) as archive:
                for info in archive:
                    # tarfile would keep them all, of an endless stream as well.
                    archive.members = []  # type: ignore[attr-defined]
                    if not info.isreg() or _META.match(info.name) or not allowed(info.name):
                        continue
                    most = _MAX_TEXT if info.name.lower().endswith(_TEXTS) else MAX_BYTES
                    data: bytes | int = info.size
                    if info.size <= most:
                        file = archive.extractfile(info)
                        assert file is not None  # of a regular member
                        data = file.read()
                    yield {"fname": info.name, "data": data, "__url__": shard["url"]}
            yield {}
        except Exception as error:
            faults(error)


def _mixed(samples: Iterator[Encoded], seed: int) -> Iterator[Encoded]:
    """Each sample once, drawn among the last 2,000, or among fewer of a gigabyte.

    Draws are those of webdataset's detshuffle, which knows no size.
    """
    rng = random.Random(seed)
    waiting: list[Encoded] = []
    size = 0

    def pick() -> Encoded:
        place = rng.randint(0, len(waiting) - 1)
        found, waiting[place] = waiting[place], waiting[-1]
        waiting.pop()
        return found

    for sample in samples:
        waiting.append(sample)
        size += len(sample.image)
        if len(waiting) < _SHUFFLED and size < _SHUFFLED_BYTES:
            more = next(samples, None)
            if more is not None:
                waiting.append(more)
                size += len(more.image)
        while len(waiting) >= _SHUFFLED // 2 or size > _SHUFFLED_BYTES:
            found = pick()
            size -= len(found.image)
            yield found
            if size <= _SHUFFLED_BYTES:
                break
    while waiting:
        yield pick()


def _opened(shards: Iterator[dict[str, Any]], faults: _Faults) -> Iterator[dict[str, Any]]:
    """Each shard with a stream of its bytes, which is closed when the next one is asked for."""
    for shard in shards:
        faults.shard, faults.members, faults.broken = shard["url"], 0, False
        try:
            with _open(shard["url"]) as stream:
                yield {**shard, "stream": stream}
                # tarfile stops at the end mark, and takes an invalid header for one. A command
                # that still writes would wait.
                behind = sum(len(b) for b in iter(lambda: stream.read(1 << 20), b"") if any(b))
            if faults.broken:
                continue
            if behind > tarfile.RECORDSIZE:  # a compressed archive's own end may come behind it
                faults(BadSample(f"invalid header: {behind:,} bytes behind it were not read"))
            elif not faults.members:
                faults(BadSample("the shard holds no image and no label"))
        except (OSError, subprocess.SubprocessError) as error:
            faults(error)


@contextmanager
def _open(url: str) -> Iterator[BinaryIO]:
    if url.startswith("pipe:"):
        refuse_commands([url], os.environ)
        command = shlex.split(url.removeprefix("pipe:"))
        with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
            assert process.stdout is not None
            try:
                yield process.stdout  # type: ignore[misc]
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    elif is_url(url):
        system, path = file_system(url)
        with system.open(path, "rb") as file:
            yield file
    else:
        with open(url, "rb") as file:
            yield file


def _labelled(groups: Iterator[dict[str, Any]], faults: _Faults) -> Iterator[Encoded]:
    for group in groups:
        shard = group["__url__"]
        images = [group[name] for name in group if name in IMAGE_EXTENSIONS]
        large = [size for size in group.values() if isinstance(size, int)]
        if large:
            reason = f"a member of {large[0]:,} bytes, which is more than is read"
            faults(BadSample(reason), group["__key__"], shard)
            continue
        try:
            label = class_number(group.get("cls"), group.get("json"))
            if len(images) != 1 or label is None:
                raise ValueError(f"it has {len(images)} images and label {label}")
        except ValueError as error:
            faults(BadSample(f"not an image with a label: {error}"), group["__key__"], shard)
            continue
        yield Encoded(group["__key__"], images[0], label, shard)
