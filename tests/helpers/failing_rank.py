"""A worker whose RANKS (0,1) cannot open their data: failing_rank.py RANKS RUN_DIR."""

import os
import sys
from typing import Any, NoReturn

from bigbatch.configs.errors import UserError
from bigbatch.trainers import job, worker


def fail(*args: Any) -> NoReturn:
    raise UserError("no shards on this machine")


if os.environ["RANK"] in sys.argv[1].split(","):
    job.open_inputs = fail
sys.exit(worker.main(sys.argv[2:]))
