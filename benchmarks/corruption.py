"""False alarms of the checks for silent data corruption: many steps, 1 to 4 ranks, kills, resumes.

    python benchmarks/corruption.py [--quick] [--steps 5000] [--seed 0] [--json FILE]

The digits recipe with a tiny network, mixup and dropout, and every check in every step: digests of
what ranks have copies of, and each rank computing a micro-batch of the next one. One run has
`reduction: exact`, one `overlapped`, of --steps each. Each start has another number of ranks, 1 to
4 in turn, and ends by SIGKILL of all its processes, or by a signal upon which it saves, after some
steps. An alarm would end a run and stand in its events. The exact run must also end with the
weights of one that makes no check, on one rank, without any interruption.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import benchmark_parser, machine, write_figures

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.writing.shard import shard
from bigbatch.launcher.child import kill_tree
from bigbatch.launcher.start import agent_command
from bigbatch.trainers.monitoring.log import last_step
from bigbatch.trainers.recovery.signals import SAVED

WORLDS = (1, 2, 3, 4)
BEFORE_END = (8, 4)  # a start ends after between an eighth and a quarter of a run's steps
RECIPE = [
    *("model={name: test_resnet, options: {drop_rate: 0.2}}", "augment.mixup=0.2"),
    *("data={workers: 0, threads: 1, image_size: 16}", "log={wandb: off, diagnosis: false}"),
    *("log.every=5", "log.ledger_every=100"),
    *("global_batch=16", "micro_batch=4", "schedule={name: constant}", "duration=1000000 steps"),
    *("optimizer={name: lars, lr: 0.01}", "checkpoint={every: 20 steps, keep: 2}"),
    *("evaluate={every: 1000 steps, precise_bn: never}", "recovery.stall_s=120"),
]
CHECKS = "recovery.corruption={digest_every: 1, recompute_every: 1}"
NO_CHECKS = "recovery.corruption={digest_every: null, recompute_every: null}"


class Course:
    """A run that is ended and started again until it has come to its last step."""

    def __init__(self, run: RunDir, steps: int, rng: random.Random) -> None:
        self.run, self.steps, self.rng = run, steps, rng
        self.starts = self.kills = self.signals = 0
        self.by_world = dict.fromkeys(WORLDS, 0)  # steps computed, those that a kill lost too

    def go(self, say: Callable[[], None]) -> None:
        while (done := last_step(self.run.metrics)) < self.steps:
            world = WORLDS[self.starts % len(WORLDS)]
            status = self.start(
                world, done + self.rng.randint(*(self.steps // n for n in BEFORE_END))
            )
            if status not in (0, SAVED, None):
                sys.exit(f"ended with status {status}: {(self.run.path / 'out.txt').read_text()}")
            say()

    def start(self, world: int, until: int) -> int | None:
        """One start, to be ended once it has come to `until` steps; None where it was killed."""
        with (self.run.path / "out.txt").open("a") as out:
            process = subprocess.Popen(
                agent_command(self.run.path, world, stop_at=self.steps), stdout=out, stderr=out
            )
        self.starts += 1
        softly = self.rng.random() < 0.3
        while process.poll() is None:
            time.sleep(0.5)
            if until <= last_step(self.run.metrics) < self.steps:
                if softly:
                    self.signals += 1
                    process.send_signal(signal.SIGUSR2)
                    process.wait()
                else:
                    self.kills += 1
                    kill_tree(process.pid)
                    process.wait()
                break
        event = [e for e in read_jsonl(self.run.events) if e.get("kind") == "start"]
        begun = event[-1]["step"] if event else 0
        self.by_world[world] += max(0, last_step(self.run.metrics) - begun)
        return process.returncode if process.returncode >= 0 else None

    def alarms(self) -> int:
        return sum(e.get("kind") == "corruption" for e in read_jsonl(self.run.events))

    def weights(self, step: int) -> str:
        folder = self.run.checkpoints / f"step-{step:08d}"
        manifest = json.loads((folder / "manifest.json").read_text())
        digest: str = manifest["files"]["model.safetensors"]["sha256"]
        return digest

    def figures(self) -> dict[str, Any]:
        return {
            "alarms": self.alarms(),
            "steps": last_step(self.run.metrics),
            "computed_by_ranks": self.by_world,
            "starts": self.starts,
            "kills": self.kills,
            "signals": self.signals,
        }


def main() -> None:
    parser = benchmark_parser(__doc__, quick="80 steps of each")
    parser.add_argument("--steps", type=int, default=5000, help="of each of the two runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    steps = 80 if options.quick else options.steps
    figures: dict[str, Any] = {}
    where = machine("bigbatch", "torch", steps=2 * steps, seed=options.seed, recipe=RECIPE)
    with tempfile.TemporaryDirectory(prefix="bigbatch-corruption-") as folder:
        shards = Path(folder) / "digits"
        shard("digits", shards, progress=False)
        known = ""
        for reduction in ("exact", "overlapped"):
            own = [f"data.path={shards}", *RECIPE, f"reduction={reduction}"]
            run = create_run(Path(folder) / reduction, load_recipe("digits", [*own, CHECKS]))
            course = Course(run, steps, random.Random(f"{options.seed}-{reduction}"))
            began = time.monotonic()

            def say(course: Course = course, began: float = began, name: str = reduction) -> None:
                figures[name] = course.figures() | {"seconds": round(time.monotonic() - began)}
                print(name, json.dumps(figures[name]), flush=True)
                write_figures(options.json, machine=where, same_weights=None, runs=figures)

            course.go(say)
            known = known or course.weights(steps)
        own = [f"data.path={shards}", *RECIPE, "reduction=exact", NO_CHECKS]
        plain = Course(
            create_run(Path(folder) / "plain", load_recipe("digits", own)), steps, random.Random(0)
        )
        plain.start(1, steps)
        same = plain.weights(steps) == known
        print(f"weights of a run without checks, on one rank: {'the same' if same else 'OTHERS'}")
    write_figures(options.json, machine=where, same_weights=same, runs=figures)
    if not same or any(found["alarms"] for found in figures.values()):
        sys.exit("a false alarm, or other weights")


if __name__ == "__main__":
    main()
