"""The process that makes steps of a run again: for `bigbatch replay`, `audit` and `diff`.

    python -m bigbatch.trainers.replay step RUN --step N [options]
    python -m bigbatch.trainers.replay audit RUN --fraction Q --seed S [options]
    python -m bigbatch.trainers.replay diff A B [options]

Exit status: 0 the same as recorded, or not recorded; 1 it differs; 2 the user's error, or not
comparable.
"""

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

from bigbatch.trainers.recovery.signals import end_at_once, until_stopped

if __name__ == "__main__":
    end_at_once()
    gc.disable()  # while it imports, as the worker does

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.notices import notice
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.evaluation import pairs
from bigbatch.trainers.ledger.audit import in_words as check_in_words
from bigbatch.trainers.ledger.compare import NOT_AGAIN, compare
from bigbatch.trainers.ledger.compare import in_words as compare_in_words
from bigbatch.trainers.monitoring.output import leave, reader_has_gone
from bigbatch.trainers.recovery.failures import report
from bigbatch.trainers.replay import certificate
from bigbatch.trainers.replay.past import find_past, whence


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return reader_has_gone()
    except Exception as error:
        return report(error, None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bigbatch.trainers.replay")
    commands = parser.add_subparsers(required=True)
    step = commands.add_parser("step")
    step.set_defaults(run=_step)
    step.add_argument("path", type=Path)
    step.add_argument("--step", type=int, required=True)
    step.add_argument("--from", dest="start", type=int)
    step.add_argument("--micro", type=int)
    step.add_argument("--sample")
    step.add_argument("--layers", action="store_true")
    step.add_argument("--before-rollback", action="store_true")
    audit = commands.add_parser("audit")
    audit.set_defaults(run=_audit)
    audit.add_argument("path", type=Path)
    audit.add_argument("--fraction", type=float, required=True)
    audit.add_argument("--seed", type=int, required=True)
    diff = commands.add_parser("diff")
    diff.set_defaults(run=_diff)
    diff.add_argument("a", type=Path)
    diff.add_argument("b", type=Path)
    for command in (step, audit):
        command.add_argument("--out", type=Path)
    for command in (step, audit, diff):
        command.add_argument("--json", action="store_true")
    return parser


def _step(options: argparse.Namespace) -> int:
    past = find_past(
        RunDir(options.path),
        options.step,
        start=options.start,
        before_rollback=options.before_rollback,
    )
    for note in past.notes:
        notice(note)
    # What a step needs takes seconds to import; what is wrong with the run has been said before.
    from bigbatch.trainers.replay.environment import differences
    from bigbatch.trainers.replay.files import PAGE, write_folder
    from bigbatch.trainers.replay.look import look
    from bigbatch.trainers.replay.replay import open_replay
    from bigbatch.trainers.replay.summary import in_words, reach, summarise

    if (said := reach(past)) is not None:
        notice(said)
    with open_replay(past) as replay:
        replay.advance(past.step - 1)
        replayed = replay.take()
        looked = look(
            replay, replayed, layers=options.layers, micro=options.micro, key=options.sample
        )
        classes = replay.job.inputs.classes
        result = summarise(replayed, looked, classes, differences(past, replay.engine.device))
    if options.out is not None:
        try:
            write_folder(options.out, result, replayed, looked)
        except OSError as error:
            raise UserError(f"cannot write {options.out}: {error}") from None
        result["out"] = str(options.out)
    if options.json:
        print(to_json(result, indent=1))
    else:
        from bigbatch.trainers.replay.tables import say

        say(result, in_words(result))
        if options.out is not None:
            print(f"page {options.out / PAGE}")
    return 1 if result["same"] is False else 0


def _audit(options: argparse.Namespace) -> int:
    from bigbatch.trainers.replay.recompute import audit_again
    from bigbatch.trainers.replay.tables import say_lines

    files, found = audit_again(RunDir(options.path), options.fraction, options.seed)
    if options.out is not None:
        certificate.write(options.out, found)
    if options.json:
        print(to_json(found, indent=1))
    else:
        lines = [*check_in_words(files), *certificate.in_words(found)]
        say_lines([*lines, certificate.verdict(found)])
    return certificate.STATUS[found["verdict"]]


def _diff(options: argparse.Namespace) -> int:
    runs = RunDir(options.a), RunDir(options.b)
    found = compare(*runs)
    assert found.parting is not None
    same, pasts = whence(runs, found.parting.step, found.parting.after)
    from bigbatch.trainers.replay.apart import in_words, look_below, verdict
    from bigbatch.trainers.replay.progress import telling
    from bigbatch.trainers.replay.tables import say_lines

    for past in pasts:
        for note in past.notes:
            notice(note)
    total = sum(past.step - past.start for past in pasts)
    below, why_not = None, None
    try:
        with telling(f"steps of {runs[0].name} and {runs[1].name}", total) as on_step:
            below = look_below(same, pasts, on_step)
    except UserError as error:  # such as data that are not here; what the ledgers say stands
        why_not = str(error)
    evaluations = pairs.pair_evaluations(*runs)
    if options.json:
        more: dict[str, Any] = {
            "below": None if below is None else below.as_json(),
            "why_not_below": why_not,
        }
        more["evaluations"] = evaluations
        paths = {"A": str(options.a), "B": str(options.b)}
        print(to_json(paths | found.as_json() | more, indent=1))
    else:
        lines = compare_in_words(found, runs)
        lines += [f"  {NOT_AGAIN}: {why_not}"] if below is None else ["", *in_words(below)]
        lines += ["", *pairs.in_words(evaluations), ""]
        say_lines([*lines, found.verdict if below is None else verdict(below, found)])
    return found.status


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    leave(until_stopped(main))
