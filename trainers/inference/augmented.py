"""`bigbatch augment`: a picture of what each operation of a recipe does, and all together.

    python -m bigbatch.trainers.inference.augmented RECIPE [KEY=VALUE]... --out FILE.png

Exit status: 0 written, 2 the user's error.
"""

import argparse
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from bigbatch.configs.files import to_json

_SMALLEST = 96  # pixels, of an image in the picture
_LINE = 20  # pixels above each row, where its name stands


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bigbatch.trainers.inference.augmented")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except Exception as error:
        from bigbatch.trainers.recovery.failures import report

        return report(error, None)


def run(options: argparse.Namespace) -> int:
    import torch

    from bigbatch.configs.errors import UserError
    from bigbatch.configs.files import write_atomically
    from bigbatch.configs.load import load_recipe
    from bigbatch.data.augment.pipeline import contact_sheet
    from bigbatch.data.batch import BatchPlan
    from bigbatch.trainers.job import training_batches
    from bigbatch.trainers.models.build import build_augmenter
    from bigbatch.trainers.planning.inputs import open_inputs

    recipe = load_recipe(options.recipe, options.overrides)
    if options.out.suffix != ".png":
        raise UserError(f"--out {options.out}: the name must end in .png")
    if options.images > recipe.micro_batch:
        raise UserError(
            f"--images {options.images}: a micro-batch, which is what is mixed, has "
            f"{recipe.micro_batch}; give at most that, or a larger micro_batch"
        )
    inputs, device = open_inputs(recipe), torch.device("cpu")
    augmenter = build_augmenter(recipe, len(inputs.classes), device, inputs)
    first = (recipe.micro_batches, options.step, options.step + 1)  # micro-batch 0 alone
    plan = BatchPlan(inputs.plan.timeline, recipe.micro_batch, 0, *first)
    batches = [
        next(iter(training_batches(recipe, inputs, plan, augmenter.view, device, whole=whole)))
        for whole in (True, False)
    ]
    rows: list[tuple[str, np.ndarray]] = []
    for name, images in augmenter.each(*batches):
        place = 1 + sum(known == name or known.startswith(f"{name}-") for known, _ in rows)
        sheet = contact_sheet(images[: options.images], columns=options.images)
        rows.append((name if place == 1 else f"{name}-{place}", sheet))
    content = BytesIO()
    draw(rows).save(content, "PNG")
    try:
        write_atomically(options.out, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error}") from None
    result = {
        "file": str(options.out),
        "rows": [name for name, _ in rows],
        "images": options.images,
    }
    print(to_json(result, indent=1) if options.json else options.out)
    return 0


def draw(rows: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """A picture of rows of images [side, columns * side, C], each under its name.

    Evaluation may have another side than training.
    """
    pictures = []
    for _, row in rows:
        height, width, channels = row.shape
        zoom = max(1, -(-_SMALLEST // height))
        picture = Image.fromarray(row[..., 0] if channels == 1 else row)
        size = (width * zoom, height * zoom)
        pictures.append(picture.resize(size, Image.Resampling.NEAREST).convert("RGB"))
    largest = max(picture.width for picture in pictures)
    height = sum(picture.height + _LINE for picture in pictures)
    sheet, top = Image.new("RGB", (largest, height), "white"), 0
    pen = ImageDraw.Draw(sheet)
    for (name, _), picture in zip(rows, pictures, strict=True):
        pen.text((4, top + 4), name, fill="black")
        sheet.paste(picture, (0, top + _LINE))
        top += picture.height + _LINE
    return sheet


if __name__ == "__main__":
    sys.exit(main())
