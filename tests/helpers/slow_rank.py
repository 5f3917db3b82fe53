"""A worker of which one rank sleeps in one phase: slow_rank.py PHASE RANK SECONDS RUN_DIR."""

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from bigbatch.trainers import job, worker

phase, rank, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
if os.environ["RANK"] == rank and phase == "data":
    load = job.train_batches

    def slow_batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in load(*args, **kwargs):
            time.sleep(seconds)
            yield batch

    job.train_batches = slow_batches
elif os.environ["RANK"] == rank and phase == "model":
    build = job.build_objective

    def slow_loss(*parts: Any) -> Any:
        function = build(*parts)

        def loss(*args: Any) -> Any:
            time.sleep(seconds)
            return function(*args)

        return loss

    job.build_objective = slow_loss
os._exit(worker.main(sys.argv[4:]))
