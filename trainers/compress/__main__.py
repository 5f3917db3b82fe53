"""`bigbatch compress`: smaller and faster forms of a trained network, measured side by side.

python -m bigbatch.trainers.compress RUN|FOLDER --method M,... --out FOLDER [options]
"""

import argparse
import gc
from pathlib import Path

from bigbatch.trainers.recovery.signals import end_at_once, until_stopped

if __name__ == "__main__":
    end_at_once()
    gc.disable()  # while it imports, as the worker does

from bigbatch.configs import durations
from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.notices import notice
from bigbatch.trainers.compress.candidates import Settings
from bigbatch.trainers.compress.sweep import PICTURE, RESULT, sweep
from bigbatch.trainers.compress.table import table_of
from bigbatch.trainers.compress.variants import make_variants
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.folder import open_ensemble
from bigbatch.trainers.ensemble.members import Member, require_labels
from bigbatch.trainers.monitoring.output import leave
from bigbatch.trainers.recovery.failures import report


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    engine: Engine | None = None
    try:
        member = _only_member(options.model, options.members)
        engine = open_engine("ddp", member.recipe.precision)
        return run(options, engine, member)
    except Exception as error:
        return report(error, engine)
    finally:
        if engine is not None:
            engine.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bigbatch.trainers.compress")
    parser.add_argument("model", type=Path, help="a run directory, or the folder of an ensemble")
    parser.add_argument("--method", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--members", default="auto")
    parser.add_argument("--share")
    parser.add_argument("--energy")
    parser.add_argument("--bits")
    parser.add_argument("--importance", default="magnitude")
    parser.add_argument("--finetune", type=durations.parse)
    parser.add_argument("--finetune-lr", type=float, default=Settings.finetune_lr)
    parser.add_argument("--images", type=int, default=Settings.images)
    parser.add_argument("--calibration", default=Settings.calibration)
    parser.add_argument("--rounds", type=int, default=Settings.rounds)
    parser.add_argument("--json", action="store_true")
    return parser


def _only_member(model: Path, choice: str) -> Member:
    ensemble = open_ensemble([model], choice)
    members = ensemble.members
    require_labels(members, "`bigbatch compress`")
    if len(members) > 1:
        names = ", ".join(member.name.rpartition("/")[2] for member in members)
        raise UserError(
            f"{model} has {len(members)} members ({names}), and one network is compressed; choose "
            "it with --members, or distil them into one"
        )
    if ensemble.combination != Combination():
        raise UserError(
            f"{model} has a temperature, a threshold or weights, which would not be right of "
            "another network; give the run, and `bigbatch ensemble` the result"
        )
    return members[0]


def run(options: argparse.Namespace, engine: Engine, member: Member) -> int:
    variants = make_variants(options.method, options.share, options.energy, options.bits)
    settings = Settings(
        taylor=options.importance == "taylor",
        finetune=options.finetune,
        finetune_lr=options.finetune_lr,
        images=options.images,
        calibration=options.calibration,
        rounds=options.rounds,
    )
    result = sweep(engine, member, variants, settings, options.out)
    if options.json:
        print(to_json(result, indent=1))
        return 0
    from bigbatch.configs.terminal import Terminal

    for row in result["results"]:
        left = row.get("convolutions", {}).get("float32", 0)
        if row["method"] == "int8" and left:
            notice(f"onnxruntime leaves {left} convolutions of the int8 file in float32 here")
    console = Terminal(soft_wrap=True)
    console.print(table_of(result))
    for name in (RESULT, PICTURE):
        console.print(str(options.out / name), highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    leave(until_stopped(main))
