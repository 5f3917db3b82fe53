"""What a user is told though nothing is refused."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from bigbatch.configs.errors import reason_of
from bigbatch.configs.printable import printable
from bigbatch.configs.redact import redact


@cache  # several recipes of one command say the same
def notice(text: str) -> None:
    """Say a line on stderr, once in a process."""
    print(f"bigbatch: {printable(redact(text))}", file=sys.stderr)


@contextmanager
def going_on(lacking: str, remedy: str) -> Iterator[None]:
    """Say what went wrong inside, and go on: the figures stand, and the rest can be had later."""
    try:
        yield
    except Exception as error:
        notice(f"{lacking}: {reason_of(error)}; {remedy}")
