"""`bigbatch`: the command line. Commands import what they need when they run.

Exit status: 0 done, 1 no (a proof that failed, a check that found something), 2 the user's
error or a disk that refuses, 75 stopped by a signal and saved, 130 interrupted by Ctrl-C with
nothing to save. Anything unforeseen keeps its traceback.
"""

import gc
import io
import os
import signal
import sys

import click

from bigbatch.configs.errors import UserError, is_refused
from bigbatch.configs.redact import message
from bigbatch.launcher.cli import (
    advice,
    comparing,
    compression,
    data,
    deploy,
    dynamics,
    forking,
    inference,
    recipes,
    replaying,
    runs,
    submission,
    training,
    tuning,
)

SECTIONS = {
    "Data": (data.shard, data.index, data.inspect, data.batches),
    "Recipes": (
        recipes.recipes,
        recipes.models,
        recipes.check,
        recipes.schedule,
        recipes.augment,
        recipes.schema,
    ),
    "Training": (
        training.train,
        training.resume,
        forking.fork,
        forking.whatif,
        submission.submit,
        training.prove,
    ),
    "Tuning": (tuning.find_lr, tuning.find_micro_batch, advice.advise, tuning.tune),
    "After training": (
        inference.evaluate,
        inference.predict,
        inference.features,
        inference.ensemble,
        deploy.export,
        training.distill,
        compression.compress,
    ),
    "Runs": (
        runs.runs,
        runs.status,
        runs.logs,
        runs.cancel,
        runs.sync,
        runs.remove,
        training.watch,
        training.diagnose,
        replaying.replay,
        dynamics.samples,
        training.report,
        comparing.diff,
        comparing.audit,
    ),
}


class Sections(click.Group):
    """A group whose help lists the commands by section, in the order of a user's work."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would end with 1, which is an answer of some commands
            print("interrupted", file=sys.stderr)
            ctx.exit(128 + signal.SIGINT)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(str(c.name)) for section in SECTIONS.values() for c in section)
        limit = formatter.width - width - 6
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                rows = [(str(c.name).ljust(width), c.get_short_help_str(limit)) for c in commands]
                formatter.write_dl(rows)


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bigbatch")
# deepspeed puts this before the arguments; the environment says the same.
@click.option("--local_rank", "--local-rank", hidden=True, expose_value=False)
def cli() -> None:
    """Distributed large-batch image training: exact, elastic, and fast.

    \b
    bigbatch shard digits shards/digits    images -> shards with an index
    bigbatch train digits --nproc 2        train here, with two processes
    bigbatch submit digits --nodes 4       train on SLURM
    """


def open_streams() -> None:
    """Put /dev/null in the place of a standard stream that was closed (`>&-`).

    Otherwise the next file that is opened would take its number, and what is printed.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # mostly that very number, and closed by exec
            os.set_inheritable(null, True)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    for stream in (sys.stdout, sys.stderr):  # a name that a terminal cannot show ends no command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


for _section in SECTIONS.values():
    for _command in _section:
        cli.add_command(_command)


def main() -> None:
    gc.set_threshold(100_000)  # what commands import leaves nothing to collect
    open_streams()
    try:
        cli()
    except UserError as error:
        print(f"bigbatch: {message(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if not is_refused(error):
            raise
        remedy = "free some space or fix the permissions, then repeat the command"
        print(f"bigbatch: {message(error)}; {remedy}", file=sys.stderr)
        sys.exit(2)
