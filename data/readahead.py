"""Local shards that are not in memory: the system is told what will be read soon.

Random reads of small ranges wait for the disk one after another, and no read-ahead of the
kernel's can guess the next one. We know it: posix_fadvise has the ranges of the micro-batches
in hand fetched side by side, while earlier ones are decoded.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from bigbatch.data.index import Index
from bigbatch.data.order import Positions
from bigbatch.data.read import ShardReader

_PROBES = 8  # ranges of a micro-batch that are looked at before any is asked for


@contextmanager
def reading_ahead(index: Index) -> Iterator[Callable[[Positions], None]]:
    """A function that has samples of a local index brought into memory; it does not wait."""
    reader = ShardReader([index.root / file.name for file in index.shards])
    columns = (index.shard, index.offset, index.size)

    def fetch(samples: Positions) -> None:
        with suppress(OSError):
            for byte_range in zip(*(column[samples].tolist() for column in columns), strict=True):
                reader.expect(*byte_range)

    with ThreadPoolExecutor(1) as thread:  # asking for a range can wait for the disk, too

        def want(samples: Positions) -> None:
            probes = samples[:: max(1, len(samples) // _PROBES)]
            places = zip(index.shard[probes].tolist(), index.offset[probes].tolist(), strict=True)
            with suppress(OSError):  # the reader of that shard meets it, too, and says it
                if not all(reader.in_memory(*place) for place in places):
                    thread.submit(fetch, samples)

        try:
            yield want
        finally:
            thread.shutdown(cancel_futures=True)
