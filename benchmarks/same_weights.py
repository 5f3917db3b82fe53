"""Whether a change of the code changes any weight: short runs of two commits, bit for bit.

    python benchmarks/same_weights.py --against REV [--quick] [--json FILE]

Each case trains the digits for some steps from a checkout of REV and from this tree, on this
machine, and compares the SHA-256 of the weights; one run is begun by REV and resumed here. Exit
status 0: all the same, 1: some differ.
--quick runs two of the cases.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from against import checkout
from machine import benchmark_parser, machine, write_figures
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
SHORT = ("duration=30 steps", "schedule.warmup=3 steps", "schedule.rewarmup=1 steps")
TEN = ("duration=10 steps", "reduction=overlapped", "schedule={name: cosine, warmup: 2 steps}")
LAMB = "optimizer={name: lamb, lr: 0.02, weight_decay: 0.01}"
CASES: dict[str, tuple[int, tuple[str, ...]]] = {  # ranks, changes to the digits recipe
    "digits, 1 rank": (1, SHORT),
    "digits, 2 ranks": (2, SHORT),
    "lamb": (1, (*TEN, LAMB)),
    "uniform, crop, flip": (
        1,
        (*TEN, "data.sampling=uniform", "augment={crop: {}, flip: 0.5, mean: [0.3], std: [0.4]}"),
    ),
    "balanced, jitter, affine, mixup": (2, (*TEN, "augment.mixup=0.4")),
    "zero1, 2 ranks": (2, (*TEN, "backend=zero1")),
    "zero2, lamb, 2 ranks": (2, (*TEN, "backend=zero2", LAMB)),
    "fsdp2, 2 ranks": (2, (*TEN, "backend=fsdp2")),
    "lbfgs": (1, (*TEN, "optimizer={name: lbfgs, lr: 0.1}")),
}
# With AVX-512 MKL rounds affine_grid's matrix product another way, which commits before e91a895
# take for their crops; with AVX2 it gives what is computed since then on any processor.
MKL = {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}
QUICK = ("digits, 2 ranks", "lamb")


BEGUN = "begun by REV, ended here"  # its first 15 steps by the other commit, the rest by this one
CREATE = (
    "import sys; from pathlib import Path; from bigbatch.configs.load import load_recipe; "
    "from bigbatch.configs.rundir import create_run; "
    "create_run(Path(sys.argv[1]), load_recipe('digits', sys.argv[2:]))"
)


def run(tree: Path, folder: Path, *arguments: str) -> None:
    """Python of the code in `tree`; ends this script with its output where it fails."""
    # typings/ maps the import name onto the folders, before an installed package is asked.
    environment = {**os.environ, "PYTHONPATH": str(tree / "typings"), "OMP_NUM_THREADS": "1"} | MKL
    command = [sys.executable, "-P", *arguments]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr}")


def trained(tree: Path, path: Path, ranks: int, changes: tuple[str, ...]) -> str:
    """SHA-256 of the weights that the code in `tree` trains, in a new run directory."""
    train = ("-m", "bigbatch.launcher.cli", "train", "digits", *changes)
    run(tree, path.parent, *train, "--nproc", str(ranks), "--run-dir", str(path))
    return weights(path)


def taken_over(old: Path, path: Path, changes: tuple[str, ...]) -> str:
    """The same of a run that the code in `old` begins and the code here resumes."""
    run(old, path.parent, "-c", CREATE, str(path), *changes)
    run(old, path.parent, "-m", "bigbatch.trainers.worker", str(path), "--stop-at", "15")
    run(ROOT, path.parent, "-m", "bigbatch.launcher.cli", "resume", str(path), "--nproc", "1")
    return weights(path)


def weights(path: Path) -> str:
    """Of all that was trained. Training's own running statistics lie apart where others have been
    made for an evaluation, which commits before precise BatchNorm do not do."""
    model = max((path / "checkpoints").glob("step-*/model.safetensors"))
    tensors, own = load_file(model), model.with_name("batch_stats.safetensors")
    if own.exists():
        tensors |= load_file(own)
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.tobytes())
    return digest.hexdigest()


def main() -> int:
    parser = benchmark_parser(__doc__, quick=f"only {' and '.join(QUICK)}")
    parser.add_argument("--against", default="HEAD", metavar="REV", help="commit to compare with")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}

    def compare(name: str, then: str, now: str) -> None:
        found[name] = {"old": then, "new": now, "same": then == now}
        print(f"{name:32} {'same' if then == now else 'DIFFERENT':10} {now[:16]}", flush=True)

    with checkout(options.against) as old, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(ROOT, folder, "-m", "bigbatch.launcher.cli", "shard", "digits", "shards")
        common = (f"data.path={folder / 'shards'}", "log.wandb=off")
        for number, (name, (ranks, changes)) in enumerate(CASES.items()):
            if options.quick and name not in QUICK:
                continue
            keys = (*changes, *common)
            then = trained(old, folder / f"old-{number}", ranks, keys)
            compare(name, then, trained(ROOT, folder / f"new-{number}", ranks, keys))
            if name == "digits, 1 rank":
                compare(BEGUN, then, taken_over(old, folder / "begun", keys))
    where = machine("torch", "timm", "accelerate", "deepspeed", against=options.against)
    write_figures(options.json, machine=where, figures=found)
    return 0 if all(case["same"] for case in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
