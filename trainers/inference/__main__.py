"""One rank of `bigbatch evaluate`, `predict` or `ensemble`: parse, load, run, say.

    python -m bigbatch.trainers.inference evaluate|predict MODEL... [options]

Started once per rank, with torchrun's environment variables where there are several.
"""

import argparse
import os
import sys
from pathlib import Path

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.notices import notice
from bigbatch.data.listing import open_listing
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.ensemble.folder import Ensemble, open_ensemble
from bigbatch.trainers.inference import evaluate as evaluation
from bigbatch.trainers.inference.forward import Forward
from bigbatch.trainers.inference.looks import TTA, check_tta
from bigbatch.trainers.inference.predict import predict
from bigbatch.trainers.recovery.failures import explain


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    engine: Engine | None = None
    try:
        ensemble = open_ensemble(options.model, options.members)
        engine = open_engine("ddp", _precision(ensemble))
        if options.command == "predict":
            return _predict(options, engine, ensemble)
        return _evaluate(options, engine, ensemble)
    except Exception as error:
        known = explain(error, engine, options.model[0])
        if known is None:
            raise
        status, text = known
        if text is not None:
            print(f"bigbatch: {text}", file=sys.stderr, flush=True)
        return status
    finally:
        if engine is not None:
            engine.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bigbatch.trainers.inference")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("evaluate", "predict"):
        command = commands.add_parser(name)
        command.add_argument("model", type=Path, nargs="+")
        command.add_argument("--members", default="auto")
        command.add_argument("--source", required=True)
        command.add_argument("--tta", choices=TTA, default="none")
        command.add_argument("--batch", type=int)
        command.add_argument("--json", action="store_true")
        command.add_argument("--out", type=Path)
    commands.choices["predict"].add_argument("--features", action="store_true")
    return parser


def _precision(ensemble: Ensemble) -> str:
    """The one in which all members were trained and evaluated, else float32."""
    found = {member.recipe.precision for member in ensemble.members}
    return found.pop() if len(found) == 1 else "fp32"


def _forward(options: argparse.Namespace, engine: Engine, ensemble: Ensemble) -> Forward:
    for member in ensemble.members:
        check_tta(options.tta, member.recipe, member.name)
    features = options.command == "predict" and options.features
    if features and len(ensemble.members) > 1:
        raise UserError(
            f"--features are those of one member, and there are {len(ensemble.members)}; choose "
            "one with --members"
        )
    members = ensemble.members
    return Forward(engine, members, tta=options.tta, batch=options.batch, features=features)


def _evaluate(options: argparse.Namespace, engine: Engine, ensemble: Ensemble) -> int:
    listing = evaluation.open_labelled(options.source, ensemble.classes)
    forward = _forward(options, engine, ensemble)
    found = evaluation.evaluate(ensemble, forward, listing)
    if found is None:
        return 0
    logits, probabilities = found
    labels = listing.index.label.astype("int64")
    result = {
        "source": options.source,
        "data_hash": listing.index.hash,
        "tta": options.tta,
        **evaluation.figures(ensemble, logits, probabilities, labels),
        "notes": listing.notes,
    }
    if options.out is not None:
        evaluation.save_evaluation(options.out, ensemble, listing, result, probabilities, labels)
    if options.json:
        print(to_json(result, indent=1))
        return 0
    from rich.console import Console

    for note in listing.notes:
        notice(note)
    console = Console(soft_wrap=True)
    console.print(f"{options.source}: {len(labels):,} images", highlight=False, markup=False)
    console.print(evaluation.table_of(engine, result))
    if options.out is not None:
        console.print(f"figures  {options.out / 'evaluation.json'}", highlight=False)
        if result["mistakes"]:
            console.print(f"mistakes {options.out / 'worst.png'}", highlight=False)
    return 0


def _predict(options: argparse.Namespace, engine: Engine, ensemble: Ensemble) -> int:
    workers = len(os.sched_getaffinity(0))
    listing = open_listing(options.source, ensemble.classes, workers)
    forward = _forward(options, engine, ensemble)
    result = predict(engine, ensemble, forward, listing, options.out, features=options.features)
    if result is None:
        return 0
    if options.json:
        print(to_json(result, indent=1))
        return 0
    for note in listing.notes:
        notice(note)
    print(
        f"{result['out']}: {result['rows']:,} rows, {result['unreadable']:,} of them without a "
        f"prediction, in {result['seconds']:.1f} s ({result['images_per_s']:,.0f} images/s)"
    )
    if result["accuracy"] is not None:
        print(f"accuracy {result['accuracy']:.2%} of {result['with_target']:,} with a target")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as the worker does: gloo's threads may spoil Python's own way out
