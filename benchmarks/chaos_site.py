"""What benchmarks/chaos.py puts into every process of a run, as its sitecustomize module.

Four faults need a place inside: death at an exact moment of checkpointing, by an audit hook
that sees each file operation; a clock that jumps; a bit of a rank's weights that flips, by a thread
that finds the memory while the steps go on; and images so bright before a BatchNorm that its
variance is no float32 number. Nothing of bigbatch is touched.
"""

import os
import random
import signal
import sys
import threading
import time
from typing import Any

FOLDER = os.environ["BIGBATCH_CHAOS"]
KILL, CLOCK = FOLDER + "/kill", FOLDER + "/clock"
FLIP, NAN = FOLDER + "/flip", FOLDER + "/nan"


def audit(event: str, arguments: tuple[object, ...]) -> None:
    if event == "import" and arguments[0] == "bigbatch.trainers.loop":
        watch_norms()
    else:
        die(event, arguments)


def watch_norms() -> None:
    """In a step of training, where the file `nan` says so, once: inputs of one BatchNorm times
    1e25. Torch's own hook for all modules; forks of this process have it, too."""
    from torch import nn
    from torch.nn.modules.module import register_module_forward_pre_hook

    looked_at = 0.0

    def hook(module: nn.Module, inputs: tuple[object, ...]) -> object:
        nonlocal looked_at
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or not module.training:
            return None
        if os.environ.get("RANK") != "0" or time.monotonic() < looked_at + 0.05:
            return None
        looked_at = time.monotonic()
        try:
            os.unlink(NAN)
        except OSError:
            return None
        return tuple(value * 1e25 for value in inputs)  # type: ignore[operator]

    register_module_forward_pre_hook(hook)


def die(event: str, arguments: tuple[object, ...]) -> None:
    """Die where the file `kill` says: EVENT, part of the path, end of the path, delay in s."""
    if event not in ("open", "os.mkdir", "os.rename", "shutil.rmtree"):
        return
    path = str(arguments[0])
    if path.endswith(f"/heartbeats/rank-{int(os.environ.get('RANK', '0')):05d}.json"):
        start_flipping()
    if "/checkpoints" not in path:
        return
    try:
        with open(KILL) as file:
            kind, part, end, delay = file.read().split(" ")
    except (OSError, ValueError):
        return
    if event == kind and part in path and path.endswith(end):
        os.unlink(KILL)
        if float(delay):
            threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)


flipping_in = 0  # the process that has the thread; a fork has none


def start_flipping() -> None:
    """A rank has begun: its thread waits for the file `flip`."""
    global flipping_in
    if flipping_in != os.getpid():
        flipping_in = os.getpid()
        threading.Thread(target=flip_when_told, daemon=True).start()


def flip_when_told() -> None:
    """Flip a bit of a weight, once the file `flip` says RANK SEED and the steps go on."""
    while True:
        time.sleep(0.01)
        try:
            with open(FLIP) as file:
                rank, seed = file.read().split(" ")
        except (OSError, ValueError):
            continue
        engine = found_engine()
        if rank == os.environ.get("RANK") and engine is not None:
            flip(engine, random.Random(seed))
            os.unlink(FLIP)


def found_engine() -> Any:
    """The engine of the loop that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_name == "train" and "engine" in frame.f_locals:
            return frame.f_locals["engine"]
        frame = frame.f_back
    return None


def flip(engine: Any, rng: random.Random) -> None:
    torch = sys.modules["torch"]
    weight = rng.choice(list(engine.module.parameters()))
    words = weight.detach().view(torch.int32).view(-1)
    words[rng.randrange(len(words))] ^= 1 << rng.randrange(31)


real, read_at, offset = time.time, 0.0, 0.0


def shifted() -> float:
    """time.time(), moved by the seconds in the file `clock`."""
    global read_at, offset
    if time.monotonic() > read_at:
        read_at = time.monotonic() + 0.2
        try:
            with open(CLOCK) as file:
                offset = float(file.read())
        except (OSError, ValueError):
            pass
    return real() + offset


time.time = shifted
sys.addaudithook(audit)
