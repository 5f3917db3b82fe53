"""What a user is told though nothing is refused."""

import sys
from functools import cache

from bigbatch.configs.printable import printable
from bigbatch.configs.redact import redact


@cache  # several recipes of one command say the same
def notice(text: str) -> None:
    """Say a line on stderr, once in a process."""
    print(f"bigbatch: {printable(redact(text))}", file=sys.stderr)
