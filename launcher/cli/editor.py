"""The JSON schema of recipes, for editors."""

from typing import Any

from bigbatch.configs.schema import Recipe


def editor_schema() -> dict[str, Any]:
    """The schema of a recipe *file*, which may say less than a whole recipe.

    What a file leaves out may come from `base:` or from the command line, so nothing is
    required here; the loader checks the whole. Keys, types and ranges are checked.
    """
    schema = _relax(Recipe.model_json_schema())
    base = {"type": "string", "description": "recipe to start from: a built-in name or a file"}
    schema["properties"] = {"base": base, **schema["properties"]}
    parts = schema["$defs"]
    for union in (
        parts["Data"]["properties"]["sampling"],
        parts["Augment"]["properties"]["ops"]["items"],
    ):  # one word stands for a part without options
        words = [parts[ref["$ref"].split("/")[-1]] for ref in union["anyOf"]]
        names = [word["properties"]["name"]["const"] for word in words]
        union["anyOf"] = [{"enum": names}, *union["anyOf"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _relax(node: Any) -> Any:
    """Without `required`; since several branches of a choice may then fit, `anyOf` them."""
    if isinstance(node, list):
        return [_relax(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        "anyOf" if key == "oneOf" else key: _relax(value)
        for key, value in node.items()
        if key not in ("required", "discriminator")
    }
