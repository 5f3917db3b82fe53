"""Digits as shards, written once for all tests here."""

from pathlib import Path

import pytest

from bigbatch.data.shard import shard


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that holds shards/digits: what `bigbatch train digits` starts from."""
    folder = tmp_path_factory.mktemp("digits")
    shard("digits", Path(folder / "shards/digits"), progress=False)
    return str(folder)
