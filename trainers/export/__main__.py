"""`bigbatch export`: one file out of a run or an ensemble.

    python -m bigbatch.trainers.export RUN|FOLDER --out FILE [--members ...] [--check]

Exit status: 0 written (and found equal), 1 the check found a difference, 2 the user's error.
"""

import argparse
from pathlib import Path

from bigbatch.configs.files import to_json
from bigbatch.trainers.monitoring.output import leave
from bigbatch.trainers.recovery.signals import until_stopped


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bigbatch.trainers.export")
    parser.add_argument("model", type=Path, help="a run directory, or the folder of an ensemble")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--members", default="auto")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--data", help="shards to check with, instead of the recipe's")
    parser.add_argument("--images", type=int, default=256, help="most that are checked")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except Exception as error:
        from bigbatch.trainers.recovery.failures import report

        return report(error, None)


def run(options: argparse.Namespace) -> int:
    from bigbatch.configs.errors import UserError
    from bigbatch.configs.targets import learns_numbers
    from bigbatch.trainers.ensemble.folder import open_ensemble
    from bigbatch.trainers.export import write
    from bigbatch.trainers.export.check import check_file, check_possible
    from bigbatch.trainers.export.scores import known_scores
    from bigbatch.trainers.planning.inputs import open_split

    write.check_ending(options.out)
    if options.check:
        check_possible(options.out)
    ensemble = open_ensemble([options.model], options.members)
    members, combination = ensemble.members, ensemble.combination
    if options.check and learns_numbers(members[0].recipe):
        raise UserError(
            "--check compares probabilities, and this model gives numbers; leave it out, and "
            "compare with what `bigbatch predict` writes"
        )
    written: list[Path] = []
    if options.check:  # before the export, which takes a while
        data = members[0].recipe.data
        path = options.data or data.path
        index = open_split(data.model_copy(update={"path": path}), data.val)
    if not (options.check and options.out.exists()):
        scores = known_scores(options.model, members, combination)
        written = write.export(options.out, members, combination, scores)
    result = {
        "file": str(options.out),
        "written": [str(path) for path in written],
        "bytes": options.out.stat().st_size,
        "members": [member.name for member in members],
    }
    check = None
    if options.check:
        check = check_file(options.out, members, combination, index, options.images)
        result["check"] = check.values()
    if options.json:
        print(to_json(result, indent=1))
    else:
        print("\n".join(result["written"]) or f"{options.out} was there already")
        if check is not None:
            print(check)
    return 0 if check is None or check.passed else 1


if __name__ == "__main__":
    leave(until_stopped(main))
