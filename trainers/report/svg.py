"""Figures as SVG that takes its colours and its font from the page around it.

Figures are drawn in stand-in colours, which become CSS variables in the SVG text, and with
text as text; so one picture serves light and dark mode. Free of torch.
"""

import base64
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bigbatch.configs.plot_style import style

# Stand-ins that no plot contains otherwise, and the CSS variables of the page they become.
INK, MUTED, GRID, BLUE, ORANGE, GREEN = (f"#0102{i:02x}" for i in range(6))
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
}
_STYLE: Any = style(INK, MUTED, GRID) | {"svg.fonttype": "none"}


def png_uri(path: Path) -> str | None:
    """A PNG file as an address that holds it; None where there is none."""
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


@contextmanager
def figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of its own, without pyplot's global state; sizes in inches."""
    with mpl.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn, drawn.add_subplot()


def to_svg(drawn: Figure, name: str, title: str) -> str:
    """The figure as an SVG element for inlining: no prolog, own ids, the page's colours."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(
        r'<svg\b(.*?)width="[^"]+"(.*?)>',
        rf'<svg role="img" aria-label="{label}"\1\2>',
        re.sub(r'(<svg\b[^>]*?)\sheight="[^"]+"', r"\1", text, count=1),
        count=1,
        flags=re.DOTALL,
    )
