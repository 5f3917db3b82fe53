"""Ranks that are started together, without restarts."""

import os

import pytest

from bigbatch.launcher import ranks


class Replaced(Exception):
    """Stands for another program in this process's place."""


def test_one_rank_does_not_inherit_what_is_left_of_another_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, str] = {}

    def replace(file: str, command: list[str], env: dict[str, str]) -> None:
        found.update(env)
        raise Replaced

    monkeypatch.setattr(os, "execvpe", replace)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(Replaced):
        ranks.run_ranks("module", [], None, 1)
    assert not {"WORLD_SIZE", "LOCAL_RANK", "RANK"} & found.keys()
    assert "OMP_NUM_THREADS" in found or "OMP_NUM_THREADS" in os.environ
