"""What a start does until its first step: seconds in which nothing else is said. No torch."""

import os
import sys


def stage(text: str) -> None:
    """Say on stderr, by rank 0 alone, what is being done now.

    On a terminal the next line is drawn over it; elsewhere it is a line of its own.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    line = f"bigbatch: {text} ..."
    shown = f"\x1b[2K{line}\r" if sys.stderr.isatty() else f"{line}\n"
    print(shown, end="", file=sys.stderr, flush=True)
