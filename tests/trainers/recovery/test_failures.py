"""How an error ends a command: one message, with a remedy that fits the command."""

import errno
from pathlib import Path
from typing import Any, NoReturn

import pytest

from bigbatch.trainers.compress import __main__ as compress
from bigbatch.trainers.ensemble import folder
from bigbatch.trainers.export import __main__ as export
from bigbatch.trainers.inference import __main__ as inference
from bigbatch.trainers.recovery.failures import report

FULL = OSError(errno.ENOSPC, "No space left on device", "x")


def test_a_full_disk_ends_a_run_with_the_way_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(FULL, None, Path("runs/a")) == 2
    assert "`bigbatch resume runs/a`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (compress, ["runs/a", "--method", "prune", "--out", "small"]),
        (export, ["runs/a", "--out", "a.onnx"]),
        (inference, ["evaluate", "runs/a", "--source", "shards/test"]),
    ],
)
def test_a_full_disk_ends_what_is_no_run_with_advice_to_repeat_it(
    module: Any,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*given: Any) -> NoReturn:
        raise FULL

    for place in (module, folder):
        monkeypatch.setattr(place, "open_ensemble", fail, raising=False)
    assert module.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "No space left on device" in line
    assert line.endswith("free some space or fix the permissions, then repeat the command")


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        report(ZeroDivisionError(), None)
