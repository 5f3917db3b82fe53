"""Which split a path tells: train, val or test, by what people call them."""

import re
from collections.abc import Sequence

from bigbatch.configs.errors import UserError

# What people call the three splits, and what we call them.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def told_splits(names: Sequence[str]) -> list[str]:
    """The split of each path, by the last of its folders or else a word of its file name that
    tells one: data/train/0.tar, imagenet-val-000000.tar.

    "" where nothing or several words do; for all where all tell the same one, which may mean a
    locomotive.
    """
    splits = [_told(name) for name in names]
    return splits if len(set(splits) - {""}) > 1 else [""] * len(names)


def _told(name: str) -> str:
    *folders, base = name.lower().split("/")
    for folder in reversed(folders):
        if folder in SPLIT_NAMES:
            return SPLIT_NAMES[folder]
    words = {SPLIT_NAMES[w] for w in re.split(r"[^a-z]+", base) if w in SPLIT_NAMES}
    return words.pop() if len(words) == 1 else ""


def one_split_only(shards: Sequence[str], place: str) -> None:
    """UserError where archives of several splits, by their file names, would become one."""
    told = sorted(set(told_splits(shards)) - {""})
    if told:
        raise UserError(
            f"{place} holds shards of several splits by their names ({', '.join(told)}); an index "
            "is one split: move each into a folder of its own, or use `bigbatch shard`, which "
            "keeps the splits apart"
        )
