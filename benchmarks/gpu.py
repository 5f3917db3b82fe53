"""On one GPU: is it right, and how fast is it?

    python benchmarks/gpu.py [--quick] [--json FILE] [--cifar10 PARQUET] [--only NAME ...]

Sections, each on its own: one that fails is reported with its error and the others go on.
Checks compare with the CPU: optimizers with themselves in float64 (which the tests hold to
formulas in NumPy), a captured step with an eager one, a resumed run with one that was not
stopped, augmentation and canvases with the CPU's. Measurements: benchmarks/optimizers.py, a
ResNet-50 step on synthetic images in memory, and whole runs of ResNet-18 on CIFAR-10 (noise
images of its size without --cifar10). Runs go through the command line in processes of their
own. Ends with status 1 where a section failed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import benchmark_parser, machine, write_figures
from torch import Tensor, nn

BENCHMARKS = Path(__file__).parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Options:
    quick: bool
    cifar10: Path | None
    folder: Path  # scratch


class Failure(Exception):
    """A check that did not hold."""


def check(ok: bool, message: str) -> None:
    if not ok:
        raise Failure(message)


def small_model(seed: int = 0) -> nn.Module:
    import timm

    torch.manual_seed(seed)
    return timm.create_model("resnet18", num_classes=10)


def optimizer_cases() -> dict[str, Any]:
    from bigbatch.configs import optimizers as c

    return {
        "lars": c.LARS(name="lars", lr=1.0, weight_decay=1e-4),
        "lars nesterov": c.LARS(name="lars", lr=1.0, weight_decay=1e-4, nesterov=True),
        "lars lr_outside": c.LARS(
            name="lars", lr=1.0, weight_decay=1e-4, momentum_form="lr_outside"
        ),
        "lamb": c.LAMB(name="lamb", lr=0.01, weight_decay=0.02),
        "lamb no correction": c.LAMB(name="lamb", lr=0.01, bias_correction=False),
    }


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    """The same random gradients on any device and in any dtype."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) * 1e-2 for p in model.parameters()]


def set_gradients(model: nn.Module, step: int) -> None:
    """Written into the same memory each time, which a captured step reads."""
    for p, g in zip(model.parameters(), gradients(model, step), strict=True):
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(g)


def distance(a: nn.Module, b: nn.Module) -> float:
    """Largest relative distance of a parameter, by its L2 norm."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    found = [
        (
            torch.linalg.vector_norm(p.detach().double().cpu() - q.detach().double().cpu())
            / torch.linalg.vector_norm(q.detach().double().cpu()).clamp(min=1e-12)
        ).item()
        for p, q in pairs
    ]
    return max(found)


def section_optimizers(options: Options) -> dict[str, Any]:
    """LARS and LAMB in float32 on the GPU against float64 on the CPU, ten steps."""
    from bigbatch.trainers.optim import LAMB, LARS, build_optimizer, gpu

    refusal = gpu.refusal(LARS, DEVICE) or gpu.refusal(LAMB, DEVICE)
    check(refusal is None, f"no Triton kernels: {refusal}")
    found = {}
    for name, config in optimizer_cases().items():
        ours, reference = small_model().to(DEVICE), small_model().double()
        pair = [(m, build_optimizer(m, config)) for m in (ours, reference)]
        for step in range(10):
            for model, optimizer in pair:
                set_gradients(model, step)
                optimizer.step()
        found[name] = distance(ours, reference)
    worst = max(found.values())
    check(worst < 1e-5, f"largest relative distance {worst:.2g}, at most 1e-5 allowed: {found}")
    return found


def section_captured(options: Options) -> dict[str, Any]:
    """A step captured in a CUDA graph against the same steps taken eagerly."""
    from bigbatch.trainers.optim import build_optimizer

    sys.path.insert(0, str(BENCHMARKS))
    from optimizers import capture

    found = {}
    for name, config in optimizer_cases().items():
        eager, captured = small_model().to(DEVICE), small_model().to(DEVICE)
        plain, other = (build_optimizer(m, config) for m in (eager, captured))
        set_gradients(captured, 0)
        replay = capture(other)  # three steps to warm up; capturing itself makes none
        for step in (0, 0, 0, 1, 2, 3):
            set_gradients(eager, step)
            plain.step()
        for step in (1, 2, 3):
            set_gradients(captured, step)
            replay()
        torch.cuda.synchronize()
        found[name] = distance(captured, eager)
    worst = max(found.values())
    check(worst < 1e-6, f"largest relative distance {worst:.2g}, at most 1e-6 allowed: {found}")
    return found


def noise_batch(count: int, size: int, even: bool) -> Any:
    """A micro-batch of smooth images; not `even`: of several sizes."""
    from bigbatch.data.batch import MicroBatch

    rng = np.random.default_rng(0)
    sizes = np.full((count, 2), size, np.int32)
    if not even:
        sizes -= rng.integers(0, size // 2, (count, 2), dtype=np.int32)
    images = []
    for height, width in sizes:
        y, x = np.mgrid[:height, :width]
        phase = rng.uniform(0, 6.28, 3)
        waves = 127 + 120 * np.sin(0.15 * x[..., None] + 0.1 * y[..., None] + phase)
        images.append(waves.astype(np.uint8).ravel())
    return MicroBatch(
        step=0,
        index=0,
        samples=np.arange(count),
        labels=torch.arange(count) % 10,
        pixels=torch.from_numpy(np.concatenate(images)),
        sizes=torch.from_numpy(sizes),
        channels=3,
    )


def section_canvas(options: Options) -> dict[str, Any]:
    """Packed uint8 pixels through page-locked memory onto the device: the same canvas."""
    for even in (True, False):
        batch = noise_batch(64, 96, even)
        pinned = batch.pin_memory()
        check(pinned.pixels.is_pinned(), "pin_memory left the pixels in pageable memory")
        same = torch.equal(pinned.canvas(DEVICE).cpu(), batch.canvas(torch.device("cpu")))
        check(same, f"canvases differ (images of {'one size' if even else 'several sizes'})")
    return {"canvases": "equal"}


def section_augment(options: Options) -> dict[str, Any]:
    """Augmented images and targets on the device against the CPU's."""
    from bigbatch.configs.augment import Affine, Augment, Crop, Jitter
    from bigbatch.data.augment.pipeline import Augmenter

    augment = Augment(
        crop=Crop(),
        flip=0.5,
        affine=Affine(degrees=10, translate=0.1, scale=0.1, shear=5),
        jitter=Jitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
        mixup=0.2,
    )
    batch = noise_batch(64, 96, even=False)
    results = []
    for device in (torch.device("cpu"), DEVICE):
        augmenter = Augmenter(
            augment, image_size=64, crop_fraction=1.0, classes=10, seed=1, device=device
        )
        results.append([t.cpu() for t in augmenter.train(batch)])
    (images, targets), (others, other_targets) = results
    difference = (images - others).abs()
    found = {"mean": difference.mean().item(), "largest": difference.max().item()}
    check(torch.allclose(targets, other_targets, atol=1e-6), "targets differ")
    check(found["mean"] < 1e-3, f"normalised images differ by {found}, mean 1e-3 allowed")
    return found


def bigbatch(options: Options, *arguments: str, ok: tuple[int, ...] = (0,)) -> None:
    """The command line, in the scratch folder."""
    command = [sys.executable, "-m", "bigbatch.launcher.cli", *arguments]
    done = subprocess.run(command, cwd=options.folder, capture_output=True, text=True)
    check(
        done.returncode in ok,
        f"bigbatch {' '.join(arguments)}: status {done.returncode}\n"
        f"{done.stdout[-1000:]}\n{done.stderr[-2000:]}",
    )


def digits(options: Options) -> None:
    if not (options.folder / "shards/digits").exists():
        bigbatch(options, "shard", "digits", "shards/digits")


def records(options: Options, run: str) -> list[dict[str, Any]]:
    from bigbatch.configs.files import read_jsonl

    path = options.folder / "runs" / run / "metrics.jsonl"
    return [r for r in read_jsonl(path) if r["kind"] == "train"]


def section_precision(options: Options) -> dict[str, Any]:
    """The digits recipe in fp32, bf16 and fp16: finite losses that fall."""
    digits(options)
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        name = f"digits-{precision}"
        bigbatch(
            options, "train", "digits", "--run", name, f"precision={precision}",
            "reduction=overlapped", "duration=10 epochs", "log.wandb=off", "--nproc", "1",
        )  # fmt: skip
        losses = [r["loss"] for r in records(options, name)]
        check(bool(np.isfinite(losses).all()), f"{precision}: a loss is not finite")
        first, last = float(np.mean(losses[:3])), float(np.mean(losses[-3:]))
        check(last < 0.7 * first, f"{precision}: the loss went from {first:.3f} to {last:.3f}")
        summary = json.loads((options.folder / "runs" / name / "summary.json").read_text())
        found[precision] = {
            "first_loss": first,
            "last_loss": last,
            "test_accuracy": summary["test"]["ensemble"]["accuracy"],
        }
    return found


def section_resume(options: Options) -> dict[str, Any]:
    """A run stopped after 10 steps and resumed against one that was not, after 20."""
    from safetensors.torch import load_file

    from bigbatch.configs.load import load_recipe
    from bigbatch.configs.rundir import create_run

    digits(options)
    settings = ["duration=20 steps", "schedule.cycles=1", "schedule.warmup=2 steps"]
    settings += ["evaluate.every=20 steps", "checkpoint.every=10 steps", "log.wandb=off"]
    bigbatch(options, "train", "digits", "--run", "straight", "--nproc", "1", *settings)
    run = create_run(options.folder / "runs/stopped", load_recipe("digits", settings))
    command = [sys.executable, "-m", "bigbatch.trainers.worker", str(run.path), "--stop-at", "10"]
    done = subprocess.run(command, cwd=options.folder, capture_output=True, text=True)
    check(done.returncode == 0, done.stderr[-2000:])
    bigbatch(options, "resume", "stopped", "--nproc", "1")
    straight, resumed = (
        load_file(
            options.folder / "runs" / name / "checkpoints" / "step-00000020" / "model.safetensors"
        )
        for name in ("straight", "stopped")
    )
    floats = [k for k, v in straight.items() if v.is_floating_point()]
    worst = max(
        ((straight[k] - resumed[k]).norm() / straight[k].norm().clamp(min=1e-12)).item()
        for k in floats
    )
    # Kernels that add in any order may differ in the last bits, and training amplifies that.
    check(worst < 1e-3, f"weights differ by {worst:.2g} of their norm, 1e-3 allowed")
    return {"relative distance": worst, "bit for bit": worst == 0.0}


def section_table(options: Options) -> dict[str, Any]:
    """benchmarks/optimizers.py: eager and captured, beside torch's and timm's."""
    file = options.folder / "optimizers.json"
    command = [sys.executable, str(BENCHMARKS / "optimizers.py"), "--json", str(file)]
    if options.quick:
        command.append("--quick")
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, end="", flush=True)
    check(done.returncode == 0, done.stderr[-2000:])
    return dict(json.loads(file.read_text())["figures"])


def section_resnet50(options: Options) -> dict[str, Any]:
    """Images a second of the engine's step: ResNet-50, bf16, LARS, images in GPU memory."""
    layouts = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
    return {name: resnet50_steps(layout, options) for name, layout in layouts.items()}


def resnet50_steps(layout: torch.memory_format, options: Options) -> dict[str, float]:
    import timm

    from bigbatch.trainers.engine.ddp import DdpEngine
    from bigbatch.trainers.optim import build_optimizer

    engine = DdpEngine("bf16", "overlapped")
    model = timm.create_model("resnet50").to(memory_format=layout)
    micro, steps = 256, 10 if options.quick else 50
    engine.prepare(model, build_optimizer(model, optimizer_cases()["lars"]), 1)
    model.train()
    images = torch.randn(micro, 3, 224, 224, device=DEVICE).contiguous(memory_format=layout)
    labels = torch.randint(1000, (micro,), device=DEVICE)
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    for number in range(-5, steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine.zero_grad()
        with engine.micro_batch(last=True):
            engine.backward(nn.functional.cross_entropy(engine.model(images), labels))
        engine.reduce()
        engine.gradient_norm().item()
        engine.step()
        torch.cuda.synchronize()
        if number >= 0:
            seconds.append(time.perf_counter() - started)
    engine.close()
    return {
        "images_per_s": round(micro / statistics.median(seconds), 1),
        "step_ms": round(statistics.median(seconds) * 1e3, 2),
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "batch": micro,
        "steps": steps,
    }


def write_noise(folder: Path, count: int) -> None:
    """Noise images of CIFAR-10's size as CLASS/*.png, a few of them over and over."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for number in range(count // 10):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")


def section_cifar10(options: Options) -> dict[str, Any]:
    """A whole run of cifar10-resnet18 in bf16: images a second, decoding included."""
    if options.cifar10 is not None:
        source = str(options.cifar10.resolve())
    else:
        source = "noise"
        write_noise(options.folder / source, 10_000)
    bigbatch(options, "shard", source, "shards/cifar10")
    epochs = 2 if options.quick or options.cifar10 is None else 6
    bigbatch(
        options, "train", "cifar10-resnet18", "--run", "cifar10", "--nproc", "1",
        f"duration={epochs} epochs", "schedule.warmup=1 epochs", "precision=bf16",
        "data.workers=8", "log.wandb=off",
    )  # fmt: skip
    steps = records(options, "cifar10")
    late = steps[len(steps) // 2 :]  # the first epoch starts kernels and workers
    summary = json.loads((options.folder / "runs/cifar10/summary.json").read_text())
    return {
        "data": "CIFAR-10" if options.cifar10 else "noise",
        "epochs": epochs,
        "images_per_s": round(statistics.median(r["images_per_s"] for r in late), 1),
        "waiting_for_data": round(
            sum(r["data_s"] for r in late) / sum(r["step_s"] for r in late), 4
        ),
        "test_accuracy": summary["test"]["ensemble"]["accuracy"],
    }


SECTIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "optimizers": section_optimizers,
    "captured": section_captured,
    "canvas": section_canvas,
    "augment": section_augment,
    "precision": section_precision,
    "resume": section_resume,
    "table": section_table,
    "resnet50": section_resnet50,
    "cifar10": section_cifar10,
}


def main() -> None:
    parser = benchmark_parser(__doc__, quick="fewer rounds and epochs")
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10 as Parquet")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="these sections alone")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch finds no GPU here, and every section of this script needs one")
        return
    os.environ.setdefault("WANDB_MODE", "disabled")
    if path := os.environ.get("PYTHONPATH"):  # runs start in another folder
        os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    results: dict[str, Any] = {
        "machine": machine("timm", "torch"),
        "quick": chosen.quick,
        "sections": {},
    }
    with tempfile.TemporaryDirectory() as name:
        options = Options(chosen.quick, chosen.cifar10, Path(name))
        for section in chosen.only or SECTIONS:
            started = time.perf_counter()
            found: dict[str, Any] = {"ok": True}
            try:
                found["figures"] = SECTIONS[section](options)
            except Exception as error:  # the others go on
                found = {"ok": False, "error": f"{type(error).__name__}: {error}"}
                if not isinstance(error, Failure):
                    found["where"] = traceback.format_exc()[-2000:]
            found["seconds"] = round(time.perf_counter() - started, 1)
            results["sections"][section] = found
            said = found.get("figures", found.get("error"))
            print(f"{'ok    ' if found['ok'] else 'FAILED'} {section:11} {said}", flush=True)
            # After each, so that a lease that ends early leaves what there is.
            write_figures(chosen.json, **results)
    failed = [n for n, found in results["sections"].items() if not found["ok"]]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
