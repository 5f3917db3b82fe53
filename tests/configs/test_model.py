"""What a recipe may say of its model, and what cannot be together."""

import warnings

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.model import Model

HE = "model.init.weights.name=he"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.norm.name=frozen_batch"], "keeps the statistics of weights to start from, and"),
        (
            ["model.norm={name: ghost_batch, samples: 48}"],
            r"samples = 48 does not divide micro_batch = \d+",
        ),
        (["model.norm={name: ghost_batch, samples: 1}"], "greater than or equal to 2"),
        (["model.norm={name: batch_renorm, r_max: 1, d_max: 0}"], "d_max 0 is plain BatchNorm"),
        (["model.norm={name: batch}"], "model.norm"),
        (
            ["model.head={name: linear, feature_norm: layer, feature_scale: 3}"],
            "feature_scale = 3 is the length of features under l2",
        ),
        (["model.head={name: cosine, feature_norm: l2}"], "feature_norm"),
        ([HE, "model.pretrained=true"], "init is for fresh weights, and model.pretrained loads"),
        ([HE, "model.checkpoint=x.safetensors"], "and model.checkpoint loads some"),
        (["model.init={}"], "model.init says nothing"),
        ([HE, "model.init.weights.slope=0.1"], "slope = 0.1 is of leaky_relu, and nonlinearity"),
        (
            ["model.init.head_prior=true", "model.head={name: cosine}", "data.sampling=uniform"],
            "sets the classifier's bias, and model.head = cosine has none",
        ),
        (
            ["model.init.head_prior=true", "data.sampling=balanced"],
            "training samples, and data.sampling = balanced draws other shares",
        ),
        (["model.name=lenet5", "model.pretrained=true"], "lenet5 has no weights to load"),
        (["model.name=my.nets:Net", "model.pretrained=true"], "my.nets:Net has no weights to"),
        (["model.attention={name: se, stages: [1, 1]}"], "names a stage twice"),
        (
            ["model.activation=SiLU", "model.norm={name: filter_response}"],
            "and model.activation = SiLU would, too",
        ),
        (["model.activation=Softmax"], "model.activation = 'Softmax'"),
        (
            ["model.pool={name: maximum}", "model.options.global_pool=max"],
            "global_pool both say how maps are pooled",
        ),
        (["model.name=''"], "at least 1 character"),
        (["model.compile=true", "backend=zero2", "reduction=overlapped"], "compile: backend zero2"),
        (["model.compile=true", "model.recompute=true"], "chooses by itself what to compute again"),
        (
            ["model.compile=true", "data.progressive={start: 16, until: 2 steps, multiple: 8}"],
            "data.progressive would have the network compiled again in the middle",
        ),
        (
            [
                "model.compile=true",
                "transfer={name: gradual, every: 1 epochs}",
                "model.pretrained=true",
            ],
            "transfer = gradual would have the network compiled again",
        ),
    ],
)
def test_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("digits", overrides)


def test_what_the_weights_are_of_says_every_key_that_changes_it() -> None:
    plain = Model(name="resnet18", channels_last=True, pretrained=True)
    assert plain.network() == {"name": "resnet18"}
    assert plain.beyond_timm() == []
    swapped = Model.model_validate(
        {"name": "resnet18", "norm": {"name": "group"}, "weight_standardization": True}
    )
    assert swapped.beyond_timm() == [
        "model.norm = group",
        "model.weight_standardization = True",
    ]
    assert Model(name="lenet5").beyond_timm() == ["model.name = lenet5"]
    drawn = Model.model_validate({"name": "resnet18", "init": {"bias": 0}})
    assert drawn.network() == {"name": "resnet18"}  # where weights come from is no function
    no_function = {"pretrained", "checkpoint", "channels_last", "init", "recompute", "compile"}
    every = Model.model_construct(**dict.fromkeys(Model.model_fields, "x"))
    with warnings.catch_warnings(action="ignore"):  # of values that are none
        assert every.network().keys() == Model.model_fields.keys() - no_function
