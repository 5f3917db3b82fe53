"""What a recipe whose training data is a stream may not ask for."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from bigbatch.configs.durations import Length
from bigbatch.configs.errors import UserError

ALLOW_PIPE = "BIGBATCH_ALLOW_PIPE"
_EXACT = "what a stream holds is known only by reading it, once and in its own order"


def refusals(recipe: Any) -> Iterator[str]:
    """Why a recipe cannot train on its data.stream; nothing where it has none."""
    data = recipe.data
    if data.stream is None:
        return
    if data.sampling.name != "uniform":
        yield (
            f"data.sampling {data.sampling.name} needs indexed shards: {_EXACT}; set it to "
            "uniform, or index the tars and set data.path"
        )
    for url in data.stream:
        if not url.strip():
            yield "data.stream names an empty place; write a path, a URL or pipe:COMMAND"
        if url.startswith("pipe:") and (problem := _command_problem(url.removeprefix("pipe:"))):
            yield f"data.stream {url!r} {problem}"
    if data.lanes:
        yield f"data.lanes = {data.lanes} needs indexed shards: {_EXACT}; set it to 0"
    if recipe.reduction == "exact":
        yield (
            "reduction exact promises weights that do not depend on the world size, and each "
            "rank draws from a stream for itself; set it to overlapped"
        )
    if places := [place for place, length in lengths(recipe, "") if length.unit == "epochs"]:
        yield (
            f"a stream has no epochs, in which {' and '.join(places)} "
            f"{'is' if len(places) == 1 else 'are'} given; give steps or samples"
        )


def refuse_commands(urls: Iterable[str], env: Mapping[str, str]) -> None:
    """Raise UserError where a stream runs commands and who starts the run has not allowed that.

    Only the environment allows it: a recipe from elsewhere cannot.
    """
    commands = [url for url in urls if "pipe:" in url]
    if commands and env.get(ALLOW_PIPE) != "1":
        raise UserError(
            f"data.stream runs a command: {commands[0]!r}; read it, then allow it by "
            f"{ALLOW_PIPE}=1 in the environment"
        )


def _command_problem(text: str) -> str | None:
    """Why a text cannot be split into a command's arguments; None where it can."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        return f"is no command: {error}; close each quotation"
    return None if words else "names no command; write it behind pipe:"


def lengths(value: Any, place: str) -> Iterator[tuple[str, Length]]:
    """Each duration in a recipe, with its dotted name."""
    if isinstance(value, Length):
        yield place, value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from lengths(item, place)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from lengths(getattr(value, name), f"{place}.{name}".lstrip("."))
