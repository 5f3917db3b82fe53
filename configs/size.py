"""The size of images: a side, or height and width. Free of all else, since workers import it."""

from collections.abc import Iterable

Size = int | tuple[int, int]  # pixels of a square's side, or (height, width)


def height_width(size: Size) -> tuple[int, int]:
    """A size, in pixels, as (height, width)."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def largest(sizes: Iterable[Size]) -> Size:
    """The smallest size that is nowhere smaller than any of these."""
    heights, widths = zip(*(height_width(size) for size in sizes), strict=True)
    height, width = max(heights), max(widths)
    return height if height == width else (height, width)


def in_words(size: Size) -> str:
    """224, or 32 x 256: height first."""
    height, width = height_width(size)
    return f"{height}" if height == width else f"{height} x {width}"
