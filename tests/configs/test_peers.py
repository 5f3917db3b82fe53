"""Keys of timm, Composer, Lightning and transformers are told what they are here."""

import re

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.explain import valid_keys
from bigbatch.configs.load import load_recipe
from bigbatch.configs.peers import HERE, NOT_OFFERED


def refusal(key: str, value: object = 1) -> str:
    with pytest.raises(UserError) as error:
        load_recipe("digits", [f"{key}={value}"])
    return str(error.value).split("\n", 1)[1].strip()


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("lr", "lr: unknown here; write optimizer.lr"),
        ("epochs", "epochs: unknown here; write duration, such as duration: 90 epochs"),
        ("batch-size", "batch-size: unknown here; write global_batch, the samples of one"),
        ("weight_decay", "weight_decay: unknown here; write optimizer.weight_decay"),
        ("warmup_epochs", "warmup_epochs: unknown here; write schedule.warmup, such as"),
        ("amp", "amp: unknown here; write precision"),
        ("optimizer.learning_rate", "optimizer.learning_rate: unknown here; write optimizer.lr"),
        ("data.num_workers", "data.num_workers: unknown here; write data.workers"),
        ("model.num_classes", "model.num_classes: not offered; classes are counted in the shards"),
        ("jsd_loss", "jsd_loss: unknown here; write loss.name; jsd, behind an augment.ops"),
        ("sync_bn", "sync_bn: not offered; see model.norm in docs/craft.md"),
        ("callbacks", "callbacks: not offered; see docs/craft.md"),
        ("devices", "devices: not offered; see `bigbatch train RECIPE --nproc N`"),
        # What is none of theirs is answered as before.
        ("optimizer.lrr", "optimizer.lrr: unknown key; did you mean lr? valid keys"),
        ("evaluate.batch_size", "evaluate.batch_size: unknown key; did you mean batch? valid"),
        ("flux", "flux: unknown key; valid keys: augment, average"),
    ],
)
def test_a_key_that_others_have_is_told_what_it_is_here(key: str, told: str) -> None:
    assert refusal(key).startswith(told)


def test_a_part_without_the_key_is_not_told_to_write_what_it_wrote() -> None:
    said = refusal("optimizer", "{name: adamw, lr: 1, momentum: 0.9}")
    assert said.startswith("optimizer.momentum: unknown key; valid keys: betas")


def test_what_is_advised_exists() -> None:
    for told in HERE.values():
        *part, key = re.split("[,;]", told)[0].split(".")
        assert key in valid_keys(part), told
    assert not HERE.keys() & NOT_OFFERED.keys()


@pytest.mark.parametrize("told", sorted({t for t in HERE.values() if "such as" in t}))
def test_the_examples_load(told: str) -> None:
    key, value = told.split("such as ")[1].split(": ", 1)
    load_recipe("digits", [f"{key}={value}"], None)
