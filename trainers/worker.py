"""One rank of a run: parse, build, run, close.

    python -m bigbatch.trainers.worker RUN_DIR [--stop-at STEPS]

Started once per rank, with torchrun's environment variables where there are several.
"""

import argparse
import gc
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # imports leave nothing to collect, and a fifth of their time goes into looking

from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.monitoring.output import copy_output, leave
from bigbatch.trainers.recovery.failures import report
from bigbatch.trainers.recovery.heartbeat import Heartbeat
from bigbatch.trainers.recovery.resume import acquire_run_lock
from bigbatch.trainers.recovery.signals import StopFlag, die_with_agent
from bigbatch.trainers.recovery.watchdog import record_collectives


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bigbatch.trainers.worker")
    parser.add_argument("run", type=Path)
    parser.add_argument("--stop-at", type=int, help="end after this many steps, unfinished")
    options = parser.parse_args(arguments)
    engine: Engine | None = None
    heartbeat: Heartbeat | None = None
    die_with_agent()
    record_collectives()
    copy_output(options.run)
    stop = StopFlag()
    try:
        run = RunDir(options.run)
        recipe = run.recipe()
        engine = open_engine(
            recipe.backend, recipe.precision, recipe.reduction, determinism=recipe.determinism
        )
        heartbeat = acquire_run_lock(run, engine)
        # Models, optimizers and augmentation take seconds to import. What is wrong with this
        # machine, the run or the other ranks has been said before.
        from bigbatch.trainers.job import build_job
        from bigbatch.trainers.run import work

        return work(build_job(run, recipe, engine, options.stop_at), stop, heartbeat)
    except Exception as error:
        return report(error, engine, options.run)
    finally:
        if heartbeat is not None:
            heartbeat.close()
        if engine is not None:
            engine.close()
        stop.close()


if __name__ == "__main__":
    leave(main())
