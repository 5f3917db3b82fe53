"""`bigbatch replay`: one process that makes a step of a run again, looks into it, and says.

    python -m bigbatch.trainers.replay RUN --step N [options]

Exit status: 0 the same as recorded, or not recorded; 1 it differs; 2 the user's error.
"""

import argparse
import gc
import sys
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # while it imports, as the worker does

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.notices import notice
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.monitoring.output import leave, reader_has_gone
from bigbatch.trainers.recovery.failures import report
from bigbatch.trainers.recovery.signals import Stopped, raise_stopped
from bigbatch.trainers.replay.past import find_past


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        status = _run(options)
        sys.stdout.flush()
        return status
    except Stopped as stop:
        return stop.status
    except BrokenPipeError:
        return reader_has_gone()
    except Exception as error:
        return report(error, None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bigbatch.trainers.replay")
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--from", dest="start", type=int)
    parser.add_argument("--micro", type=int)
    parser.add_argument("--sample")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--before-rollback", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser


def _run(options: argparse.Namespace) -> int:
    past = find_past(
        RunDir(options.run),
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


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    raise_stopped()
    leave(main())
