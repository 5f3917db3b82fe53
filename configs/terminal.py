"""The one door by which text from data comes to a terminal through rich."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from bigbatch.configs.printable import printable


class Terminal(Console):
    """A console to which text is text: no markup, no emoji codes, no escape sequences.

    Only what is drawn by rich itself moves the cursor or colours.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        if isinstance(renderable, Text):
            plain = printable(renderable.plain)
            if plain != renderable.plain:  # as long as it was, so styles keep their places
                renderable = renderable.copy()
                renderable.plain = plain
        return super().render(renderable, options)
