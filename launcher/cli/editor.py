"""The JSON schema of recipes, for editors."""

from typing import Any

from bigbatch.configs.schema import Recipe


def editor_schema() -> dict[str, Any]:
    """The schema of a recipe *file*, which may say less than a whole recipe.

    What a file leaves out may come from `base:` or from the command line, so nothing is
    required here; the loader checks the whole. Keys, types and ranges are checked.
    """
    schema = Recipe.model_json_schema()
    names = {}
    for key, part in schema["$defs"].items():
        if name := part.get("properties", {}).get("name"):
            names[f"#/$defs/{key}"] = dict(name)
            # What a kind is, stands where it is chosen.
            name.setdefault("description", " ".join(part.get("description", "").split()))
    schema = _of_files(schema, names)
    base = {"type": "string", "description": "recipe to start from: a built-in name or a file"}
    schema["properties"] = {"base": base, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _of_files(node: Any, names: dict[str, Any]) -> Any:
    """Without `required`, and with parts that may be written by their name alone.

    `names` has, by reference, the schema of the name of each part that has one.
    """
    if isinstance(node, list):
        return [_of_files(item, names) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: value for key, value in node.items() if key != "required"}
    choices = node.get("anyOf", [node])
    for i, choice in enumerate(choices):
        others = [_of_files(other, names) for other in (*choices[:i], *choices[i + 1 :])]
        if "discriminator" in choice:
            return _rest(node) | _by_kind(choice["discriminator"]["mapping"], others)
        if choice.get("$ref") in names:  # of one kind, such as the model, whatever its name
            part = {"$ref": choice["$ref"]}
            return _rest(node) | _mapping_or(part, names[choice["$ref"]], others)
    return {key: _of_files(value, names) for key, value in node.items()}


def _rest(node: dict[str, Any]) -> dict[str, Any]:
    """What a node says beside its choices: description, default."""
    return {k: v for k, v in node.items() if k not in ("anyOf", "oneOf", "$ref", "discriminator")}


def _by_kind(kinds: dict[str, str], others: list[dict[str, Any]]) -> dict[str, Any]:
    """A part of one of `kinds`, by name: a wrong name is told the right ones, and of a right one
    only its own keys are looked at. Without a name, which `base:` may say, any kind may fit."""
    names = sorted(kinds)
    by_name = [
        {
            "if": {"properties": {"name": {"const": name}}, "required": ["name"]},
            "then": {"$ref": kinds[name]},
        }
        for name in names
    ]
    unnamed = {
        "if": {"not": {"required": ["name"]}},
        "then": {"anyOf": [{"$ref": kinds[name]} for name in names]},
    }
    part = {
        "type": "object",
        "properties": {"name": {"enum": names}},
        "allOf": [*by_name, unnamed],
    }
    told = {"discriminator": {"propertyName": "name", "mapping": kinds}}
    return told | _mapping_or(part, {"enum": names}, others)


def _mapping_or(
    part: dict[str, Any], name: dict[str, Any], others: list[dict[str, Any]]
) -> dict[str, Any]:
    """`part` where a mapping is written, its name or one of `others` where something else is."""
    if "enum" in name and others == [{"type": "null"}]:  # one list, so that one error names all
        name, others = {"enum": [*name["enum"], None]}, []
    alone = {"anyOf": [name, *others]} if others else name
    return {"if": {"type": "object"}, "then": part, "else": alone}
