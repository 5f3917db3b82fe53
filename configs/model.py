"""The network as a recipe writes it; trainers/models builds it."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue

from bigbatch.configs import blocks, init, norm
from bigbatch.configs.blocks import Activation, Attention, Pool
from bigbatch.configs.init import Init
from bigbatch.configs.norm import Head, Norm
from bigbatch.configs.part import StrictModel
from bigbatch.configs.size import height_width

TEACHING = ("lenet5", "zfnet", "nin")  # small nets written here
TORCHVISION = "torchvision:"

_ELSEWHERE = {  # arguments of timm.create_model that are no options here, and what says them
    "model_name": "write model.name",
    "pretrained": "write model.pretrained",
    "checkpoint_path": "write model.checkpoint",
    "pretrained_cfg_overlay": "write model.checkpoint",
    "num_classes": "it follows from the classes of the data",
    "in_chans": "write data.channels",
    "features_only": "training needs a classifier's logits; drop it",
}


class Model(StrictModel):
    """A network: by a name of timm's or torchvision's, a teaching net, or a user's own.

    timm's names stand as they are, torchvision's behind `torchvision:`; `package.module:callable`
    is called with num_classes, in_chans and the options, and gives an nn.Module.
    """

    name: Annotated[str, Field(min_length=1)]
    pretrained: bool = Field(
        False, description="start from the weights that timm or torchvision has under this name"
    )
    checkpoint: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="local weights to start from"
    )
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
        default_factory=dict,
        description="keyword arguments of timm.create_model, or of what "
        "builds the model in its place",
    )
    norm: Norm | None = Field(None, description="what takes the place of each BatchNorm")
    weight_standardization: bool = Field(
        False,
        description="convolutions' weights have mean 0 and variance 1 over each output's inputs "
        "(Qiao et al. 2019, arXiv:1903.10520)",
    )
    head: Head | None = Field(None, description="the classifier: linear after a norm, or cosine")
    activation: Activation | None = Field(
        None, description="what takes the place of each activation, by torch's name"
    )
    pool: Pool | None = Field(None, description="how maps become features before the classifier")
    joined_stages: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="stages, by timm's names in feature_info, the means of whose maps go into the "
        "classifier before the model's own features",
    )
    attention: Attention | None = Field(None, description="se, cbam or scse at the end of stages")
    recompute: bool = Field(
        False,
        description="compute activations again in the backward pass rather than keep them: less "
        "memory, about a third more work, the same weights",
    )
    compile: bool = Field(
        False,
        description="torch.compile for the passes of training, after minutes of compiling at each "
        "start; dropout masks are those without it, and evaluation is never compiled",
    )
    init: Init | None = Field(None, description="fresh weights drawn otherwise than the model does")

    @property
    def from_timm(self) -> bool:
        return ":" not in self.name and self.name not in TEACHING

    @property
    def own(self) -> bool:
        """Whether it is a callable of the user's."""
        return ":" in self.name and not self.name.startswith(TORCHVISION)

    def without_weights(self) -> Self:
        """The same network for weights that are loaded afterwards: neither read nor drawn here."""
        return self.model_copy(update={"pretrained": False, "checkpoint": None, "init": None})

    def network(self) -> dict[str, Any]:
        """The keys that say which function the weights are of, and what they say."""
        kept = self.without_weights()
        return kept.model_dump(
            mode="json", exclude={"channels_last", "recompute", "compile"}, exclude_defaults=True
        )

    def form(self) -> dict[str, Any]:
        """The same without the rates at which it drops: two alike take the same weights."""
        options = {key: value for key, value in self.options.items() if "drop" not in key}
        return self.network() | {"options": options}

    def beyond_timm(self) -> list[str]:
        """Why timm alone cannot build this network."""
        if not self.from_timm:
            return [f"model.name = {self.name}"]
        changed = {k: v for k, v in self.network().items() if k not in ("name", "options")}
        names = {k: v["name"] if isinstance(v, dict) else v for k, v in changed.items()}
        return [f"model.{key} = {name}" for key, name in names.items()]


def refusals(recipe: Any) -> Iterator[str]:
    """What a recipe's options cannot say of its model."""
    options, size = recipe.model.options, recipe.data.image_size
    yield from norm.refusals(recipe)
    yield from init.refusals(recipe)
    yield from blocks.refusals(recipe)
    if recipe.model.pretrained and (where := _without_pretrained(recipe.model)):
        yield (
            f"model.pretrained: {where} has no weights to load; leave it out, or name a file by "
            "model.checkpoint"
        )
    for key, remedy in _ELSEWHERE.items():
        if key in options:
            yield f"model.options.{key}: {remedy}"
    for key, rate in options.items():
        if "drop" in key and key.endswith("_rate") and rate is not None and not _is_rate(rate):
            yield (
                f"model.options.{key} = {rate!r} is no probability; give a number from 0 to less "
                "than 1"
            )
    if recipe.model.joined_stages:
        yield from _joined_refusals(recipe.model)
    if recipe.model.compile:
        yield from _compile_refusals(recipe)
    written = options.get("img_size", size)
    if written not in (size, list(height_width(size))):
        yield (
            f"model.options.img_size = {written} and data.image_size = {size} differ; set "
            "data.image_size to what the model shall see, and img_size likewise"
        )


def _joined_refusals(model: Model) -> Iterator[str]:
    names = model.joined_stages
    if not model.from_timm:
        yield (
            f"model.joined_stages needs timm's forward_intermediates, which {model.name} has not; "
            "leave it out, or take a timm model"
        )
    if len(set(names)) < len(names):
        yield f"model.joined_stages = {names} names a stage twice; name each once"
    if model.recompute:
        yield (
            "model.recompute is not done where model.joined_stages takes maps on the way; leave "
            "one of them out"
        )


def _compile_refusals(recipe: Any) -> Iterator[str]:
    """What has not been shown to compute the same compiled, or would compile anew in mid-run."""
    if recipe.backend != "ddp":
        yield (
            f"model.compile: backend {recipe.backend} takes parameters apart between the passes "
            "that would be compiled; set backend to ddp, or model.compile to false"
        )
    if recipe.model.recompute:
        yield (
            "model.compile chooses by itself what to compute again in the backward pass; set "
            "model.recompute to false, or model.compile"
        )
    again = {
        "data.progressive": recipe.data.progressive is not None,
        "transfer = gradual": recipe.transfer is not None and recipe.transfer.name == "gradual",
    }
    for key, here in again.items():
        if here:
            yield (
                f"model.compile: {key} would have the network compiled again in the middle of the "
                f"run, for minutes in which ranks seem to hang; drop {key}, or set model.compile "
                "to false"
            )


def _without_pretrained(model: Model) -> str | None:
    known = model.from_timm or model.name.startswith(TORCHVISION)
    return None if known else model.name


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
