"""One style for all pictures."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def drawing() -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Functions of the product that write a picture of matplotlib's, but for the report's own."""
    for room in ("configs", "data", "trainers", "launcher"):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            if ".savefig(" not in text or path.name == "svg.py":
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    source = ast.get_source_segment(text, node) or ""
                    if ".savefig(" in source:
                        yield path.name, node, source


def test_every_picture_has_it() -> None:
    found = list(drawing())
    assert len(found) >= 9
    for name, node, source in found:
        decorators = [ast.unparse(each) for each in node.decorator_list]
        assert "plot_style()" in decorators or "with plot_style():" in source, (name, node.name)
