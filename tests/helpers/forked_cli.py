"""The command line in a fork of the tests' parent, from which its own runs are forked too.

A user's starts a process to fork from, or becomes another program, which takes seconds:
tests/test_main_job.py does.
"""

import os
import sys
from typing import Any, NoReturn

from bigbatch.launcher import child, ranks
from bigbatch.launcher.cli.main import main
from bigbatch.trainers.warm.parent import OF_A_RANK, OF_AN_END, fork_parent

modules = (*OF_A_RANK, *OF_AN_END, "bigbatch.trainers.agent")
parent = fork_parent(modules, dict(os.environ))  # outside of all that an end would clean up


def become(file: str, command: list[str], env: dict[str, str]) -> NoReturn:
    status = parent.popen(command, env=env).wait()
    sys.exit(status if status >= 0 else 128 - status)


def share(*of_a_parent: Any) -> Any:
    return parent


child.start_parent = ranks.start_parent = share
os.execvpe = become  # type: ignore[assignment]
main()
