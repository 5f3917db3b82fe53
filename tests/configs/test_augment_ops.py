"""docs/craft.md lists the operations as the code has them."""

import re
from pathlib import Path

from pydantic.fields import FieldInfo

from bigbatch.configs import augment_ops as c

PAGE = Path(__file__).resolve().parents[2] / "docs/craft.md"
KINDS = {
    "geometry": c.Geometric.__args__,
    "policy": c.Policy.__args__,
    "filling in": c.Eraser.__args__,
}


def value(field: FieldInfo) -> str:
    """A default as a recipe writes it."""
    if field.is_required():
        return "..."
    default = field.default
    if isinstance(default, list):
        return "ImageNet's"
    if isinstance(default, tuple):
        return f"[{', '.join(f'{x:.3g}' for x in default)}]"
    if isinstance(default, bool) or default is None:
        return {True: "true", False: "false", None: "null"}[default]
    return f"{default:.3g}" if isinstance(default, float) else str(default)


def table() -> str:
    rows = ["| `name` | kind | what it does | keys and defaults |", "|---|---|---|---|"]
    for op in c.OPS:
        kind = next((kind for kind, ops in KINDS.items() if op in ops), "pixels")
        text = " ".join((op.__doc__ or "").split())
        keys = {name: f for name, f in op.model_fields.items() if name != "name"}
        keys = {**{n: f for n, f in keys.items() if n == "p"}, **keys}
        given = ", ".join(f"{name}: {value(field)}" for name, field in keys.items())
        (name,) = op.model_fields["name"].annotation.__args__  # type: ignore[union-attr]
        rows.append(f"| `{name}` | {kind} | {text} | `{given}` |")
    return "\n".join(rows)


def test_the_table_of_operations_is_the_code() -> None:
    page = PAGE.read_text()
    found = re.search(r"^\| `name` \|.*?(?=\n\n)", page, re.M | re.S)
    assert found is not None
    assert found[0] == table(), f"write this into {PAGE.name}:\n{table()}"


def test_each_key_is_described_or_names_itself() -> None:
    plain = {"degrees", "factor", "bits", "distortion", "ratio", "fill", "policy", "severity", "n",
             "std", "magnitude", "convention", "area", "hue", "p"}  # fmt: skip
    for op in c.OPS:
        for name, field in op.model_fields.items():
            assert name == "name" or field.description or name in plain, (op, name)
