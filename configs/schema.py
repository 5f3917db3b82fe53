"""The recipe: everything that decides what a training run computes."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from bigbatch.configs.clipping import Clip
from bigbatch.configs.durations import Length, Period
from bigbatch.configs.optimizers import SHARDABLE, Optimizer
from bigbatch.configs.part import Count, Fraction, NonNegative, Part, Positive
from bigbatch.configs.sampling import Sampling, Uniform
from bigbatch.configs.schedules import Cosine, Schedule
from bigbatch.configs.stream import refusals

Range = tuple[Positive, Positive]
Share = Annotated[float, Field(gt=0, le=1)]


class Data(Part):
    """Shards as `bigbatch shard` and `bigbatch index` leave them: PATH/SPLIT/*.tar + index/."""

    path: str = Field(
        description="folder that holds one folder of shards for each split; or its URL, such as "
        "s3://bucket/photos"
    )
    train: str = Field("train", description="split to train on")
    val: str = Field("val", description="split that gates snapshots and picks the soup")
    test: str | None = Field("test", description="split reported at the end, used for no choice")
    stream: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="train on tars that cannot be indexed, drawn at random, not exactly once: "
        "paths, URLs, or pipe:COMMAND; {000..099} stands for many. val and test come from path",
    )
    sampling: Sampling = Uniform()
    lanes: Annotated[int, Field(ge=0)] = Field(
        0,
        description="0: full random order. L: for network storage, L streams that each read few "
        "shards at a time; divides the number of micro-batches in a step",
    )
    window: Count = Field(4, description="shards that are shuffled together in a lane")
    cache: str | None = Field(
        None, description="folder for copies of remote shards; by default ~/.cache/bigbatch"
    )
    cache_gb: Positive = Field(100.0, description="size of the cache on each node, in 1e9 bytes")
    image_size: Annotated[int, Field(ge=8, le=4096)] = 224
    channels: Literal[1, 3] = 3
    workers: Annotated[int, Field(ge=0)] = Field(2, description="decoding processes per rank")
    threads: Count = Field(2, description="decoding threads in each worker")
    bad_samples: Annotated[int, Field(ge=0)] = Field(
        100, description="how many unreadable samples are substituted before the run stops"
    )


class Model(Part):
    """A timm model."""

    name: str
    pretrained: bool = False
    checkpoint: str | None = Field(None, description="local weights to start from")
    stem: Literal["standard", "small"] = Field(
        "standard",
        description="small: for images of about 32 pixels, a ResNet's first convolution becomes "
        "3x3 of stride 1, without the pooling after it (He et al. 2016, section 4.2)",
    )
    channels_last: bool = Field(
        False,
        description="images and convolutions in the memory order NHWC on a GPU, where its tensor "
        "cores work in it; without effect on a CPU",
    )
    options: dict[str, JsonValue] = Field(
        default_factory=dict, description="keyword arguments of timm.create_model"
    )


class Loss(Part):
    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Crop(Part):
    """Random resized crop: area as a fraction of the image, aspect ratio log-uniform."""

    scale: tuple[Share, Share] = (0.35, 1.0)
    ratio: Range = (3 / 4, 4 / 3)


class Affine(Part):
    """Small random affine map: each value is drawn uniformly from [-x, x]."""

    degrees: NonNegative = 0.0
    translate: Fraction = Field(0.0, description="fraction of the image size")
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="zoom in [1-x, 1+x]")
    shear: NonNegative = Field(0.0, description="degrees")


class Jitter(Part):
    """Colour jitter: factors in [1-x, 1+x]; hue as a fraction of the colour circle."""

    brightness: NonNegative = 0.0
    contrast: NonNegative = 0.0
    saturation: NonNegative = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class Augment(Part):
    """Device-side augmentation. A part that is null is off."""

    crop: Crop | None = None
    affine: Affine | None = None
    flip: Fraction = Field(0.0, description="probability of a horizontal flip")
    jitter: Jitter | None = None
    mixup: NonNegative = Field(0.0, description="alpha of the Beta distribution; 0 is off")
    mean: list[float] = Field([0.485, 0.456, 0.406], description="per channel, of pixels in [0,1]")
    std: list[Positive] = Field([0.229, 0.224, 0.225], description="per channel")


class Evaluate(Part):
    every: Period = Field(Length(1, "epochs"), description="and at the run's end")
    batch: Count = Field(256, description="images per evaluation batch, on each rank")
    crop_fraction: Share = Field(
        1.0, description="share of the image's short side in the centre crop"
    )


class Checkpoint(Part):
    every: Period = Field(Length(1, "epochs"), description="and at the run's end")
    keep: Count = Field(2, description="how many of the newest checkpoints stay on disk")
    keep_best: Annotated[int, Field(ge=0)] = Field(
        0, description="and how many of those with the best accuracy on the validation split"
    )
    keep_every: Period | None = Field(
        None, description="and one each time this much is done, for good"
    )


class Spike(Part):
    """What counts as a leap of the loss: both the factor and the deviations are exceeded."""

    factor: Annotated[float, Field(gt=1)] = Field(
        2.0, description="multiple of the median of the last losses"
    )
    deviations: Positive = Field(8.0, description="robust standard deviations above the median")
    window: Annotated[int, Field(ge=5)] = Field(50, description="how many last losses are taken")


class Recovery(Part):
    """What a run does about a step that goes wrong."""

    spike: Spike | None = Field(None, description="also go back from a finite loss that leaps")
    max_rollbacks: Annotated[int, Field(ge=0)] = Field(
        0,
        description="how often the run goes back to a checkpoint from before a bad step and "
        "steps over it; 0: a step that is not finite ends the run",
    )
    step_over: Count = Field(
        10, description="how many steps, up to the bad one, then make no update"
    )
    stall_s: Positive = Field(
        300.0,
        description="seconds without progress after which a step counts as hung; or 20 times "
        "the longest wait so far, if that is more",
    )


class Ensemble(Part):
    """Snapshots at the ends of cosine cycles, and what is made of them."""

    gate: Fraction = Field(
        0.02, description="a snapshot is a member if its val accuracy is this near the best one"
    )
    soup: bool = Field(True, description="also build a greedy weight soup")


class Log(Part):
    every: Count = Field(1, description="steps between records in metrics.jsonl")
    details_every: Count = Field(
        50, description="steps between records of timing by rank, trust ratios, and the machine"
    )
    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="auto: online where logged in, otherwise offline"
    )
    project: str = Field("bigbatch", description="wandb project")
    tensorboard: bool = Field(False, description="also write event files to tensorboard/")
    prometheus: str | None = Field(
        None, description="folder of node_exporter's textfile collector, for bigbatch-RUN.prom"
    )
    trace: bool = Field(False, description="write every micro-batch's samples to trace/")


class Recipe(Part):
    """One training run. A step is a pure function of this recipe and the step number."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    duration: Period
    global_batch: Count = Field(256, description="samples in one optimizer step")
    micro_batch: Count = Field(64, description="samples in one forward/backward pass")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    backend: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = Field(
        "ddp",
        description="what each rank holds: ddp everything; zero1 its share of the optimizer "
        "state, zero2 also of the gradients, fsdp2 also of the parameters",
    )
    reduction: Literal["overlapped", "exact"] = Field(
        "overlapped",
        description="overlapped: gradients cross ranks during the backward pass; exact: summed "
        "in float64 after it, so that weights do not depend on the world size, bit for bit",
    )
    clip: Clip | None = Field(None, description="gradient clipping: norm, value or adaptive")
    data: Data
    model: Model
    loss: Loss = Loss()
    optimizer: Optimizer
    schedule: Schedule = Cosine(name="cosine")
    augment: Augment = Augment()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    recovery: Recovery = Recovery()
    ensemble: Ensemble = Ensemble()
    log: Log = Log()

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one step: also the largest world size that can run the recipe."""
        return self.global_batch // self.micro_batch

    @property
    def lr_scale(self) -> float:
        """What optimizer.scale multiplies the learning rate by at this global_batch."""
        scale = self.optimizer.scale
        return 1.0 if scale is None else scale.factor(self.global_batch)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch "
                f"{self.micro_batch}; choose a micro_batch that divides it"
            )
        problem = self._sharding_problem()
        if problem:
            raise ValueError(f"backend: {self.backend} {problem}")
        if self.optimizer.name == "lbfgs" and (self.clip is not None or self.precision == "fp16"):
            raise ValueError(
                "optimizer lbfgs compares losses and gradients of one function: it works without "
                "clip, and with precision fp32 or bf16"
            )
        if self.recovery.spike and not self.recovery.max_rollbacks:
            raise ValueError(
                "recovery.spike is set, but recovery.max_rollbacks is 0: set it to how often the "
                "run may go back, such as 3"
            )
        lanes, sampling = self.data.lanes, self.data.sampling.name
        if lanes and sampling != "uniform":
            raise ValueError(
                f"data.lanes = {lanes} works with data.sampling uniform, not {sampling}: a class "
                "may lie in any shard; set data.lanes to 0, or data.sampling to uniform"
            )
        if lanes and self.micro_batches % lanes:
            raise ValueError(
                f"data.lanes = {lanes} does not divide the {self.micro_batches} micro-batches of "
                "a step (global_batch / micro_batch); choose lanes that divide it"
            )
        if refused := list(refusals(self)):
            raise ValueError("; ".join(refused))
        for name in ("mean", "std"):
            values: list[Any] = getattr(self.augment, name)
            if len(values) != self.data.channels:
                raise ValueError(
                    f"augment.{name} has {len(values)} values for data.channels = "
                    f"{self.data.channels}; give one value per channel"
                )
        return self

    def _sharding_problem(self) -> str | None:
        """Why the recipe cannot run in pieces, and what to do about it; None where it can."""
        if self.backend == "ddp":
            return None
        if self.backend == "zero3":
            return (
                "is not offered: its hooks cut parameters out of modules one by one, and its "
                "weights have not been shown to be those of ddp; fsdp2 shards parameters too, "
                "and is exact: set backend to fsdp2"
            )
        if self.reduction == "exact":
            return (
                "cannot have reduction exact, which adds up whole gradients in float64; set "
                "reduction to overlapped, or backend to ddp"
            )
        if self.optimizer.name not in SHARDABLE:
            return (
                f"gives an optimizer pieces of each layer, and {self.optimizer.name} needs whole "
                f"layers; choose one of {', '.join(SHARDABLE)}, or set backend to ddp"
            )
        if self.clip is not None and self.clip.name == "adaptive":
            return (
                "cannot clip adaptively: units of a layer are cut apart; set clip.name to norm "
                "or value, or backend to ddp"
            )
        return None
