"""A model card beside an exported file: Markdown that Hugging Face reads, of known facts alone.

Form: huggingface.co/docs/hub/model-cards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bigbatch.configs.size import in_words
from bigbatch.trainers.evaluation.accuracy import LEVEL, wilson
from bigbatch.trainers.export.timm_weights import config_path

_SHOWN_CLASSES = 50


@dataclass(frozen=True)
class Score:
    """How well the model of a file did on a split of `images`, where that is known."""

    split: str
    accuracy: float
    nll: float
    ece: float
    images: int | None
    chosen_by: bool  # whether members, weights or temperature were chosen by this split

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's, of the accuracy."""
        if self.images is None:
            return None
        return wilson(round(self.accuracy * self.images), self.images)


def model_card(
    file: Path,
    description: Mapping[str, Any],
    scores: Sequence[Score],
    audits: Sequence[str] = (),
) -> str:
    """The card of a file, of which `description` (description.py) says what it is.

    `audits` are paragraphs of certificates (`bigbatch audit`).
    """
    if "outputs" in description:
        return _card_of_numbers(file, description, audits)
    return "\n\n".join(
        [
            _front_matter(file, description, scores),
            f"# {file.stem}",
            _summary(description),
            "## Run it",
            _usage(file, description["channels"]),
            "## Scores",
            _scores(scores),
            "## Limits",
            _limits(description, scores),
            "## Classes",
            _classes(description["classes"]),
            "## Training",
            _training(description),
            *(["## Audit", *audits] if audits else []),
        ]
    )


def _card_of_numbers(file: Path, description: Mapping[str, Any], audits: Sequence[str]) -> str:
    """The card of a file that gives numbers, not probabilities."""
    front = {
        "library_name": "onnx" if file.suffix == ".onnx" else "pytorch",
        "tags": ["image-regression", "bigbatch"],
    }
    outputs = description["outputs"]
    code = f"```python\n{_USAGE[file.suffix][1]}```"
    code = code[: code.index("probabilities, label")].replace("classes = ", "outputs = ")
    code = code.replace('"classes"', '"outputs"')
    call = 'session.run(None, {"pixels": pixels})' if file.suffix == ".onnx" else "network(pixels)"
    code += f"(prediction,) = {call}\nprint(dict(zip(outputs, prediction[0].tolist())))\n```"
    return "\n\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
            f"# {file.stem}",
            _summary(description),
            "## Run it",
            f"`pip install {_USAGE[file.suffix][0]}`",
            _filled(code, file, description["channels"]),
            "## Scores",
            "`bigbatch evaluate` measures them.",
            "## Limits",
            "- Numbers are in the unit of the targets that were trained on.\n"
            "- Only the centre square of an image is seen.\n"
            "- Of images of other sources than the training data's nothing is known.",
            "## Outputs",
            _classes(outputs),
            "## Training",
            _training(description),
            *(["## Audit", *audits] if audits else []),
        ]
    )


def _front_matter(file: Path, description: Mapping[str, Any], scores: Sequence[Score]) -> str:
    library = {".onnx": "onnx", ".safetensors": "timm"}.get(file.suffix, "pytorch")
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "bigbatch"],
    }
    if scores:
        data = str(description["members"][0]["recipe"]["data"]["path"])
        results = [
            {
                "task": {"type": "image-classification"},
                "dataset": {"name": data, "type": data, "split": score.split},
                "metrics": [{"type": "accuracy", "value": round(score.accuracy, 6)}],
            }
            for score in scores
        ]
        front["model-index"] = [{"name": file.stem, "results": results}]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _summary(description: Mapping[str, Any]) -> str:
    members = description["members"]
    models = ", ".join(dict.fromkeys(m["model"] for m in members))
    numbers = description.get("outputs")
    what = f"{len(numbers):,} numbers of an image" if numbers else "An image classifier of "
    what += f": {models}" if numbers else f"{len(description['classes']):,} classes: {models}"
    if len(members) > 1:
        how = "the mean of their numbers" if numbers else _HOW[description["combination"]["method"]]
        what += f", {len(members)} members combined by {how}"
    rows = [
        f"{what}. Written by bigbatch {description['bigbatch_version']}.",
        "",
        "| member | model | image size | centre crop | mean | std | recipe | training data |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for m in members:
        data = f"index `{m['data_hash']}`" if m["data_hash"] else "not known"
        rows.append(
            f"| {m['name']} | {m['model']} | {in_words(m['image_size'])} | {_crop(m)} "
            f"| {_numbers(m['mean'])} | {_numbers(m['std'])} | `{m['recipe_hash']}` | {data} |"
        )
    temperature, threshold = description["temperature"], description["reject_below"]
    if temperature != 1:
        rows += ["", f"Temperature {temperature:g}, applied after combining."]
    if threshold is not None:
        rows += ["", f"Predictions with a probability below {threshold:g} count as rejected."]
    return "\n".join(rows)


def _crop(member: Mapping[str, Any]) -> str:
    fraction, squashed = member["crop_fraction"], member["crop_mode"] == "squash"
    if squashed:
        return f"{fraction:g} of both sides"
    square = isinstance(member["image_size"], int)
    return f"{fraction:g} of the {'short side' if square else 'largest part of this shape'}"


_HOW = {
    "mean": "the mean of their probabilities",
    "logits": "the mean of their logits",
    "weights": "a weighted mean of their probabilities",
    "vote": "a vote",
    "stack": "a logistic regression on their log-probabilities",
    "boost": "boosted trees on their log-probabilities",
}


def _usage(file: Path, channels: int) -> str:
    needs, code = _USAGE[file.suffix]
    return f"`pip install {needs}`\n\n```python\n{_filled(code, file, channels)}```"


def _filled(code: str, file: Path, channels: int) -> str:
    """Code with the names of this file, and the shape of its pixels."""
    names = {
        "FILE": file.name,
        "CONFIG": config_path(file).name,
        "MODE": "L" if channels == 1 else "RGB",
        "AXES": "[None, :, :, None]" if channels == 1 else "[None]",
        "SHAPE": f"[1, H, W, {channels}]",
    }
    for word, value in names.items():
        code = code.replace(word, value)
    return code


# By the ending of the file: what it needs, and how to run it on a picture.
_USAGE = {
    ".onnx": (
        "onnxruntime pillow",
        """import json
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("FILE")
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("MODE")
pixels = np.asarray(image)AXES  # uint8 SHAPE of any size: the file crops and resizes
probabilities, label = session.run(None, {"pixels": pixels})[:2]
print(classes[label[0]], probabilities[0, label[0]])
""",
    ),
    ".pt2": (
        "torch pillow",
        """import json
import numpy as np
import torch
from PIL import Image, ImageOps

extra = {"description.json": ""}
network = torch.export.load("FILE", extra_files=extra).module()
classes = json.loads(extra["description.json"])["classes"]
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("MODE")
pixels = torch.tensor(np.asarray(image)AXES)  # uint8 SHAPE of any size: it crops and resizes
probabilities, label = network(pixels)[:2]
print(classes[label[0]], probabilities[0, label[0]].item())
""",
    ),
    ".safetensors": (
        "timm",
        """import json
import timm
from PIL import Image, ImageOps

config = json.load(open("CONFIG"))
options = {"num_classes": config["num_classes"], **config["model_args"]}
model = timm.create_model(config["architecture"], checkpoint_path="FILE", **options).eval()
seen = timm.data.resolve_data_config({}, config["pretrained_cfg"], use_test_size=True)
transform = timm.data.create_transform(**seen)
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("MODE")
probabilities = model(transform(image)[None]).softmax(1)[0]
print(config["label_names"][probabilities.argmax()], probabilities.max().item())
""",
    ),
}


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return "Not measured for these members in this combination; `bigbatch evaluate` does."
    rows = [
        f"| split | images | accuracy | {LEVEL:.0%} interval (Wilson) | NLL | ECE |",
        "|---|---|---|---|---|---|",
    ]
    for s in scores:
        ends = f"{s.interval[0]:.2%} to {s.interval[1]:.2%}" if s.interval else "not known"
        images = "not known" if s.images is None else f"{s.images:,}"
        rows.append(
            f"| {s.split} | {images} | {s.accuracy:.2%} | {ends} | {s.nll:.4f} | {s.ece:.4f} |"
        )
    return "\n".join(rows)


def _limits(description: Mapping[str, Any], scores: Sequence[Score]) -> str:
    lines = [
        "- Whatever an image shows, the probabilities of the classes below sum to 1: an image of "
        "none of them gets one of them.",
        "- Only the centre square of an image is seen.",
        "- Scores are those of images drawn as the splits were; of other sources nothing is known.",
    ]
    if description["temperature"] == 1:
        lines.append("- Probabilities are not calibrated: no temperature is applied.")
    lines += [
        f"- The split {score.split} took part in choosing the model: its scores are too good."
        for score in scores
        if score.chosen_by
    ]
    return "\n".join(lines)


def _classes(classes: Sequence[str]) -> str:
    shown = [f"{number}. {name}" for number, name in enumerate(classes[:_SHOWN_CLASSES])]
    if len(classes) > _SHOWN_CLASSES:
        shown.append(f"\nand {len(classes) - _SHOWN_CLASSES:,} more, which the file itself names.")
    return "\n".join(shown)


def _training(description: Mapping[str, Any]) -> str:
    recipes = {m["recipe_hash"]: m["recipe"] for m in description["members"]}
    return "\n\n".join(
        f"Recipe `{name}`:\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```"
        for name, recipe in recipes.items()
    )


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
