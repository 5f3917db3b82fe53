"""A network that starts from trained weights, looked at before anything is trained.

Its features of any images, and how well they tell the classes of the training split apart.
"""

import argparse
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.load import load_recipe
from bigbatch.configs.notices import notice
from bigbatch.configs.schema import Recipe
from bigbatch.configs.targets import learns_targets
from bigbatch.configs.words import plural
from bigbatch.data.index import draw_samples
from bigbatch.data.listing import open_listing
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.folder import Ensemble
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.evaluation import transferability
from bigbatch.trainers.inference.agreement import require_same_images
from bigbatch.trainers.inference.forward import Forward
from bigbatch.trainers.inference.predict import predict
from bigbatch.trainers.models.build import build_model, choose_memory_format
from bigbatch.trainers.planning.inputs import open_split

_UNKNOWN = ("",)  # no class of which one could know


@dataclass(frozen=True)
class Pretrained(Member):
    """The network of a recipe as its training would start, but for the classifier's meaning."""

    quiet: bool = False

    def build(self, device: torch.device = torch.device("cpu")) -> nn.Module:  # noqa: B008
        recipe = self.recipe
        model = build_model(
            recipe.model,
            classes=len(self.classes),
            channels=recipe.data.channels,
            seed=recipe.seed,
            image_size=recipe.data.image_size,
            info=self.info,
            quiet=self.quiet,
        )
        memory_format = choose_memory_format(recipe.model, device)
        return model.eval().to(device).to(memory_format=memory_format)


def open_pretrained(recipe: Recipe, classes: tuple[str, ...], quiet: bool) -> Ensemble:
    """The network of a recipe as one that features can be taken of. UserError without weights."""
    model = recipe.model
    if not (model.pretrained or model.checkpoint):
        raise UserError(
            f"recipe {recipe.name} starts from no weights, so that its features would be random: "
            "set model.pretrained or model.checkpoint"
        )
    weights = Path(model.checkpoint or model.name)
    member = Pretrained(recipe.name, weights, recipe, classes, quiet)
    return Ensemble((member,), Combination())


def classes_of(recipe: Recipe) -> tuple[str, ...] | None:
    """The classes of a recipe's data; None where its shards are not here."""
    try:
        return open_split(recipe.data, recipe.data.val).classes
    except UserError:
        return None


def features(options: argparse.Namespace, engine: Engine) -> int:
    """Write the features of every image of a source."""
    recipe = load_recipe(options.recipe, options.set)
    found = classes_of(recipe)
    ensemble = open_pretrained(recipe, found or _UNKNOWN, engine.rank != 0)
    workers = len(os.sched_getaffinity(0))
    listing = open_listing(options.source, ensemble.classes, workers)
    require_same_images(engine, options.source, listing)
    forward = Forward(engine, ensemble.members, batch=options.batch, features=True)
    result = predict(
        engine, ensemble, forward, listing, options.out, features=True, predictions=False
    )
    if result is None:
        return 0
    if options.json:
        print(to_json(result, indent=1))
        return 0
    for note in listing.notes if found else []:
        notice(note)
    print(
        f"{result['out']}: features of {plural(result['rows'], 'image')}, {result['unreadable']:,} "
        f"of them unreadable, in {result['seconds']:.1f} s ({result['images_per_s']:,.0f} images/s)"
    )
    return 0


def transfer(options: argparse.Namespace, engine: Engine) -> int:
    """Say how to train on, from the size of the training split and its nearest neighbours."""
    recipe = load_recipe(options.recipe, options.set)
    if recipe.data.stream is not None:
        raise UserError("data.stream has no split to look at; index its tars, and set data.path")
    if learns_targets(recipe):
        raise UserError(
            f"--transfer compares the labels of neighbours, and loss {recipe.loss.name} learns "
            "targets; name a recipe that learns labels"
        )
    index = open_split(recipe.data, recipe.data.train)
    ensemble = open_pretrained(recipe, index.classes, engine.rank != 0)
    started = time.perf_counter()
    chosen = draw_samples(index, options.samples, recipe.seed, "transfer")
    forward = Forward(engine, ensemble.members, batch=options.batch, features=True)
    gathered = forward.gathered(chosen)
    if gathered is None:
        return 0
    measured = transferability.measure(gathered[1], np.asarray(chosen.label, np.int64))
    advice = transferability.advise(
        measured, index.class_counts.tolist(), options.small, forward.stages()
    )
    advice["seconds"] = round(time.perf_counter() - started, 1)
    if options.json:
        print(to_json(advice, indent=1))
        return 0
    for line in transferability.in_words(advice, shlex.join([options.recipe, *options.set])):
        print(line)
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace, Engine], int]] = {
    "features": features,
    "transfer": transfer,
}


def add_commands(commands: Any) -> None:
    """Their command lines; started by launcher/cli/inference.py and advice.py."""
    for name in COMMANDS:
        command = commands.add_parser(name)
        command.add_argument("recipe")
        command.add_argument("--set", action="append", default=[])
        command.add_argument("--batch", type=int)
        command.add_argument("--json", action="store_true")
    commands.choices["features"].add_argument("--source", required=True)
    commands.choices["features"].add_argument("--out", type=Path, required=True)
    commands.choices["transfer"].add_argument("--samples", type=int, default=2000)
    commands.choices["transfer"].add_argument("--small", type=int, default=100)
