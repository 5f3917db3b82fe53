"""Test-time augmentation: which looks are taken of an image, whose probabilities are averaged."""

from dataclasses import replace

from bigbatch.configs.errors import UserError
from bigbatch.configs.schema import Recipe
from bigbatch.data.geometry import View

TTA = ("none", "flip", "five", "ten", "scales")
# Of the crop's side: as timm's and torchvision's evaluation, which crop 0.875, and closer.
_SCALES = (1.0, 0.875, 0.75)
_CORNERS = ((0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
_SMALLEST = 0.875  # side of five crops of a view that shows the whole short side


def view_of(recipe: Recipe) -> View:
    """What a recipe's evaluation sees of an image."""
    evaluate = recipe.evaluate
    return View(recipe.eval_size, evaluate.crop_fraction, squash=evaluate.squash)


def looks_of(view: View, tta: str) -> list[View]:
    """The looks of one image, the plain one first.

    flip: also mirrored. five: the centre and the four corners, in crops of 7/8 of the side where
    `view` shows all of it. ten: those and their mirror images (Krizhevsky et al. 2012, section
    4.1). scales: centre crops of 1, 7/8 and 3/4 of the side.
    """
    if tta == "scales":
        return [replace(view, fraction=view.fraction * scale) for scale in _SCALES]
    looks = [view]
    if tta in ("five", "ten"):
        side = min(view.fraction, _SMALLEST)
        looks = [replace(view, fraction=side, place=place) for place in _CORNERS]
    if tta in ("flip", "ten"):
        looks += [replace(look, flip=1.0) for look in looks]
    return looks


def check_tta(tta: str, recipe: Recipe, name: str) -> None:
    """Raise UserError where looks are mirrored that training never mirrored: digits, or text."""
    if tta in ("flip", "ten") and recipe.augment.flip == 0:
        raise UserError(
            f"--tta {tta} mirrors images, which member {name} has never seen mirrored "
            "(augment.flip = 0); use --tta five or scales, or leave it out"
        )
