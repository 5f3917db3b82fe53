"""Where samples come from and in what order, as a recipe writes it; data/ reads them."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from bigbatch.configs.durations import Duration, Length, Period
from bigbatch.configs.part import Count, ImageSize, Positive, StrictModel
from bigbatch.configs.sampling import Sampling, Uniform
from bigbatch.configs.size import Size, height_width, in_words


class Progressive(StrictModel):
    """Smaller images at first: a side that grows linearly with the steps up to image_size.

    Touvron et al. 2019 (arXiv:1906.06423) say why small images may do, Tan and Le 2021
    (arXiv:2104.00298) let them grow; the schedule is that of ffcv-imagenet.
    """

    start: ImageSize = Field(description="size of the images of the first steps")
    after: Duration = Field(Length(0, "steps"), description="it grows from here on")
    until: Period = Field(description="from here on it is image_size")
    multiple: Count = Field(32, description="sides in between are the nearest multiples of it")


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
        "paths, URLs, or pipe:COMMAND (allowed by BIGBATCH_ALLOW_PIPE=1 in the environment); "
        "{000..099} stands for many. val and test come from path",
    )
    sampling: Sampling = Field(
        Uniform(), description="how often an epoch draws each class: uniform, balanced, ..."
    )
    repeats: Count = Field(
        1,
        description="views of each sample, in as many micro-batches after each other; an epoch "
        "keeps its number of images, and so holds 1/repeats of the samples",
    )
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
    image_size: ImageSize = Field(
        224, description="of what the model is trained on: a side in pixels, or [height, width]"
    )
    progressive: Progressive | None = Field(
        None, description="train on smaller images at first, which grow to image_size"
    )
    channels: Literal[1, 3] = Field(3, description="3: colour; 1: gray")
    workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        2, description="decoding processes per rank"
    )
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(
        2, description="decoding threads in each worker"
    )
    bad_samples: Annotated[int, Field(ge=0)] = Field(
        100, description="how many unreadable samples are substituted before the run stops"
    )

    @property
    def smallest_size(self) -> Size:
        """Of the images that the model is trained on."""
        return self.image_size if self.progressive is None else self.progressive.start


def refusals(recipe: Any) -> Iterator[str]:
    """Why a recipe cannot read its splits, or not in lanes."""
    for role in ("train", "val", "test"):
        split = getattr(recipe.data, role)
        if split is not None and (split.startswith("/") or ".." in split.split("/")):
            yield (
                f"data.{role} {split!r} leads out of data.path; name a folder inside it, or set "
                "data.path to where all splits are"
            )
    yield from _repeated(recipe)
    grows = recipe.data.progressive
    last = height_width(recipe.data.image_size)
    first = last if grows is None else height_width(grows.start)
    if grows is not None and (first == last or first[0] > last[0] or first[1] > last[1]):
        yield (
            f"data.progressive.start = {in_words(grows.start)} is no smaller than data.image_size "
            f"= {in_words(recipe.data.image_size)}, to which images grow; lower it, or drop "
            "data.progressive"
        )
    lanes, sampling = recipe.data.lanes, recipe.data.sampling.name
    if lanes and sampling != "uniform":
        yield (
            f"data.lanes = {lanes} works with data.sampling uniform, not {sampling}: a class "
            "may lie in any shard; set data.lanes to 0, or data.sampling to uniform"
        )
    common = recipe.common_batch // recipe.micro_batch
    if lanes and common % lanes:
        which = "a step" if isinstance(recipe.global_batch, int) else "each step"
        yield (
            f"data.lanes = {lanes} does not divide the {common} micro-batches of "
            f"{which} (global_batch / micro_batch); choose lanes that divide it"
        )


def _repeated(recipe: Any) -> Iterator[str]:
    """Beside what samples cannot be repeated."""
    repeats, data = recipe.data.repeats, recipe.data
    if repeats == 1:
        return
    fewest = recipe.smallest_batch // recipe.micro_batch
    if repeats > fewest:
        yield (
            f"data.repeats = {repeats}, and a step has {fewest} micro-batches "
            "(global_batch / micro_batch), each of which shows a sample once; lower repeats or "
            "micro_batch"
        )
    others = {
        "data.stream": (data.stream is not None, "whose samples no order repeats"),
        "data.lanes": (data.lanes > 0, "whose micro-batches read shards of their own"),
        "data.sampling": (
            data.sampling.name == "progressive",
            "progressive, whose epochs would be `repeats` times as long",
        ),
    }
    for key, (there, why) in others.items():
        if there:
            yield f"data.repeats = {repeats} does not go with {key}, {why}; set data.repeats to 1"
