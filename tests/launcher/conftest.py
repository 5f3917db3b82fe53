"""Digits as shards, written once for all tests here."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shards(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that holds shards/digits: what `bigbatch train digits` starts from."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "shards").mkdir()
    (folder / "shards/digits").symlink_to(digits)
    return str(folder)
