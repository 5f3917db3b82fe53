"""Where samples come from and in what order, as a recipe writes it; data/ reads them."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from bigbatch.configs.part import Count, Positive, StrictModel
from bigbatch.configs.sampling import Sampling, Uniform


class Data(StrictModel):
    """Shards as `bigbatch shard` and `bigbatch index` leave them: PATH/SPLIT/*.tar + index/."""

    path: str = Field(
        description="folder that holds one folder of shards for each split; or its URL, such as "
        "s3://bucket/photos"
    )
    train: str = Field("train", description="split to train on")
    val: str = Field("val", description="split that gates snapshots and picks the soup")
    test: str | None = Field("test", description="split reported at the end, used for no choice")
    stream: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="train on tars that cannot be indexed, drawn at random, not exactly once: "
        "paths, URLs, or pipe:COMMAND; {000..099} stands for many. val and test come from path",
    )
    sampling: Sampling = Uniform()
    lanes: Annotated[int, Field(ge=0)] = Field(
        0,
        description="0: full random order. L: for network storage, L streams that each read few "
        "shards at a time; divides the number of micro-batches in a step",
    )
    window: Count = Field(4, description="shards that are shuffled together in a lane")
    cache: str | None = Field(
        None, description="folder for copies of remote shards; by default ~/.cache/bigbatch"
    )
    cache_gb: Positive = Field(100.0, description="size of the cache on each node, in 1e9 bytes")
    image_size: Annotated[int, Field(ge=8, le=4096)] = 224
    channels: Literal[1, 3] = 3
    workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        2, description="decoding processes per rank"
    )
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(
        2, description="decoding threads in each worker"
    )
    bad_samples: Annotated[int, Field(ge=0)] = Field(
        100, description="how many unreadable samples are substituted before the run stops"
    )


def refusals(recipe: Any) -> Iterator[str]:
    """Why a recipe cannot read its splits, or not in lanes."""
    for role in ("train", "val", "test"):
        split = getattr(recipe.data, role)
        if split is not None and (split.startswith("/") or ".." in split.split("/")):
            yield (
                f"data.{role} {split!r} leads out of data.path; name a folder inside it, or set "
                "data.path to where all splits are"
            )
    lanes, sampling = recipe.data.lanes, recipe.data.sampling.name
    if lanes and sampling != "uniform":
        yield (
            f"data.lanes = {lanes} works with data.sampling uniform, not {sampling}: a class "
            "may lie in any shard; set data.lanes to 0, or data.sampling to uniform"
        )
    if lanes and recipe.micro_batches % lanes:
        yield (
            f"data.lanes = {lanes} does not divide the {recipe.micro_batches} micro-batches of "
            "a step (global_batch / micro_batch); choose lanes that divide it"
        )
