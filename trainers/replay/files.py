"""A replayed step as a folder: JSON, a page, a picture of each micro-batch, and tensors."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bigbatch.configs.files import to_json, write_atomically
from bigbatch.trainers.recovery.tensor_files import write_tensors
from bigbatch.trainers.replay.look import Looked
from bigbatch.trainers.replay.replay import Replayed
from bigbatch.trainers.replay.summary import Result, in_words, mixed_words
from bigbatch.trainers.report import pages
from bigbatch.trainers.report.grid import grid

RESULT, PAGE, STEP, MICRO = (
    "replay.json",
    "replay.html",
    "step.safetensors",  # gradient/NAME, update/NAME
    "micro-batch.safetensors",  # images, targets, logits and losses of the one looked into
)
_COLUMNS = 8


def write_folder(folder: Path, result: Result, replayed: Replayed, looked: Looked) -> list[Path]:
    """Write all that is known of the step below `folder`; returns the files. Raises OSError."""
    folder.mkdir(parents=True)
    pictures = []
    for micro, images in looked.images.items():
        path = folder / f"micro-{micro:05d}.png"
        write_atomically(path, picture(result, micro, images))
        pictures.append(path)
    update = {
        name: replayed.after[name].double() - replayed.before[name].double()
        for name in replayed.gradient
    }
    tensors = {f"gradient/{name}": t for name, t in replayed.gradient.items()}
    tensors |= {f"update/{name}": t.float() for name, t in update.items()}
    write_tensors(folder / STEP, {name: _plain(t) for name, t in tensors.items()})
    write_tensors(folder / MICRO, {name: _plain(t) for name, t in looked.tensors.items()})
    write_atomically(folder / RESULT, to_json(result, indent=1) + "\n")
    write_atomically(folder / PAGE, page(result, [path.name for path in pictures]))
    return [folder / PAGE, folder / RESULT, folder / STEP, folder / MICRO, *pictures]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def picture(result: Result, micro: int, images: npt.NDArray[np.uint8]) -> bytes:
    """A micro-batch [B, H, W, C] as the network saw it, as PNG: key and class, then share or loss
    above each image; what is guilty has a frame."""
    own = [s for s in result["samples"] if s["micro"] == micro]
    guilty = result["guilty"]
    names = (
        {guilty.get("sample"), *guilty.get("samples", ())} if guilty["micro"] == micro else set()
    )
    lines = []
    for sample in own:
        said = [] if sample["loss"] is None else [f"loss {sample['loss']:.3g}"]
        said += [] if sample["share"] is None else [f"{sample['share']:.0%}".replace("-0%", "0%")]
        said += [f"+ {mixed}"] if (mixed := mixed_words(sample)) else []
        lines.append((f"{sample['key']}: {sample['class']}", ", ".join(said)))
    content = io.BytesIO()
    marked = {i for i, sample in enumerate(own) if sample["key"] in names}
    shown = [image[..., 0] if image.shape[2] == 1 else image for image in images]
    grid(shown, lines, _COLUMNS, marked).save(content, "PNG", optimize=True)
    return content.getvalue()


def page(result: Result, pictures: Sequence[str]) -> str:
    """The findings as a page, which shows the pictures that lie beside it."""
    columns = ("gradient_norm", "share", "usual", "update_norm", "weight_norm", "trust_ratio")
    parts = [
        pages.sentences(in_words(result)),
        "<h2>Layers</h2>\n",
        pages.table("layer", columns, sorted(result["layers"], key=_by("gradient_norm"))),
        "<h2>Micro-batches</h2>\n",
        pages.table("micro", ("loss", "norm", "share", "without"), result["micro_batches"]),
        f"<h2>Samples of micro-batch {result['micro']}</h2>\n",
        pages.sentences([f"{result['terms']}."]),
        pages.table(
            "key",
            ("class", "loss", "norm", "share", "layer"),
            sorted(
                (s for s in result["samples"] if s["micro"] == result["micro"]), key=_by("share")
            ),
        ),
    ]
    if result["activations"]:
        columns = ("kind", "mean", "largest", "dead", "saturated", "non_finite")
        parts += ["<h2>Activations</h2>\n", pages.table("layer", columns, result["activations"])]
    parts += [pages.picture(Path(name).stem, name) for name in pictures]
    return pages.page(f"Step {result['step']} of {result['run']}", parts)


def _by(name: str) -> Any:
    """What sorts rows by a figure, the largest first; those without one come last."""
    return lambda row: (row[name] is None, -(row[name] or 0.0))
