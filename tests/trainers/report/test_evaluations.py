"""What the report shows of evaluated splits: figures, pictures, and a line for a damaged file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.evaluation.record import EVALUATION, WORST, write_evaluation
from bigbatch.trainers.report.report import write_report
from tests.trainers.evaluation.test_record import WHOLE
from tests.trainers.report.test_report import Page, make_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "digits", steps=0, finished=False)


def with_evaluation(run: RunDir, split: str = "test", **changes: Any) -> Path:
    folder = run.evaluations / split
    write_evaluation(folder, WHOLE | changes)
    return folder


def test_every_figure_and_picture_of_each_split(run: RunDir) -> None:
    folder = with_evaluation(run)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / WORST)
    with_evaluation(run, "val", mistakes_drawn=0, notes=["members were chosen on this split"])
    text = write_report(run).read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.pictures == 8
    assert len([r for r in page.references if r.startswith("data:image/png")]) == 2
    low, high = WHOLE["accuracy_interval"]
    for wanted in (
        f'>ensemble at temperature 0.8</td><td class="n">{WHOLE["accuracy"]:.2%}</td>',
        f"{100 * low:.1f} to {100 * high:.1f}%",
        f"{WHOLE['before_temperature']['ece']:.4f}",
        f"{WHOLE['members']['each'][2]['brier']:.4f}",
        f"Among the first five: {WHOLE['top5']:.2%}",
        f"over classes: {WHOLE['balanced_accuracy']:.2%}",
        "ensemble minus b: ",
        "is rejected",
        "hold the label",
        "cost: ",
        "Of 7 mistakes",
        "200 images of shards/test; members were chosen on this split",
    ):
        assert wanted in text, wanted
    assert "evaluations/ is empty" not in text


def test_one_model_is_called_by_its_name(run: RunDir) -> None:
    alone = {"members": None, "member_names": ["digits/soup"], "top5": None, "top5_interval": None}
    alone |= {"temperature": None, "before_temperature": None, "tta": "five", "mc_dropout": 4}
    with_evaluation(run, **alone)
    text = write_report(run).read_text()
    assert "200 images of shards/test; looks: five; passes of each with dropout: 4</p>" in text
    assert '<tr class="strong"><td class="nowrap">digits/soup</td>' in text
    assert "Among the first five" not in text
    assert Page(text).pictures == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"\0\1\2", json.dumps(WHOLE)[:-9].encode()])
def test_a_damaged_file_is_a_line_and_the_others_stay(run: RunDir, content: bytes) -> None:
    (with_evaluation(run, "test") / EVALUATION).write_bytes(content)
    with_evaluation(run, "val")
    text = write_report(run).read_text()
    assert "evaluations/test/evaluation.json cannot be read: " in text
    assert "bigbatch evaluate writes it anew" in text
    assert Page(text).pictures == 4


def test_a_folder_that_cannot_be_read_is_a_line(run: RunDir) -> None:
    (run.evaluations / "test" / EVALUATION).mkdir(parents=True)
    assert "cannot be read: Is a directory" in write_report(run).read_text()


def test_names_from_outside_stay_text(run: RunDir) -> None:
    evil = "<script>alert('$x$')</script>"
    members = WHOLE["members"] | {"each": [m | {"name": evil} for m in WHOLE["members"]["each"]]}
    with_evaluation(run, '"><script>', source=evil, notes=[evil], members=members)
    page = Page(write_report(run).read_text())
    assert page.scripts == 0
    assert page.open == []


def test_without_evaluations_the_page_says_how_to_get_one(run: RunDir) -> None:
    assert "<code>bigbatch evaluate digits</code>" in write_report(run).read_text()
