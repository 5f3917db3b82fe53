"""What `shard`, `index` and `inspect` say of what they leave out."""

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from bigbatch.launcher.cli.main import cli
from tests.helpers.archives import pack


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    return result.exit_code, result.output


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (9, 9), (number, 7, 7)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shard_counts_what_it_leaves_out(here: Path) -> None:
    for i in range(10):
        for name in ("ant", "bee"):
            (here / "in" / name).mkdir(parents=True, exist_ok=True)
            (here / "in" / name / f"{i}.jpg").write_bytes(picture(i))
            (here / "in" / name / f"{i}.heic").write_text("x")
    status, text = run("shard", "in", "out")
    assert status == 0
    said = "left out: 20 (.heic): not the extension of an image that is read; first ant/0.heic"
    assert said in text.splitlines()
    assert "each by its name: out/skipped.txt" in text.splitlines()
    assert "warning" not in text
    status, text = run("inspect", "out")
    assert status == 0
    assert "not the extension of an image" in text
    pack(here / "in" / "old.tar", ("a.jpg", picture(1)), ("a.cls", b"0"))
    assert run("shard", "in", "two", "--kind", "images")[0] == 0


def test_shard_warns_of_one_class(here: Path) -> None:
    (here / "in" / "only").mkdir(parents=True)
    for i in range(20):
        (here / "in" / "only" / f"{i}.jpg").write_bytes(picture(i))
    status, text = run("shard", "in", "out")
    assert status == 0
    assert "warning: all samples are of one class: there is nothing to tell apart" in text
    assert "warning: all samples are of one class" in run("inspect", "out")[1]


def test_index_says_what_it_passes_over_and_which_classes_are_empty(here: Path) -> None:
    files = [
        (f"{i}.{part}", data)
        for i in range(6)
        for part, data in (("jpg", picture(i)), ("cls", b"%d" % (i % 3 + 1)), ("txt", b"words"))
    ]
    pack(here / "t" / "0.tar", *files)
    (here / "t" / "1.tgz").write_text("x")
    status, text = run("index", "t")
    assert status == 0
    assert text.splitlines()[1:] == [
        "passed over: 6 members .txt",
        "passed over: 1 file .tgz",
        "warning: classes without a sample: 0",
    ]
    told = json.loads(run("index", "t", "--json")[1])
    assert told["passed_over"] == {"members .txt": 6, "files .tgz": 1}
    assert told["empty_classes"] == ["0"]
    shown = json.loads(run("inspect", "t", "--json")[1])
    assert shown["splits"]["t"]["passed_over"] == told["passed_over"]
    assert "members .txt in t" in run("inspect", "t")[1]


def test_index_exits_1_for_a_label_without_an_image(here: Path) -> None:
    good = (("a.jpg", picture(1)), ("a.cls", b"0"))
    pack(here / "t" / "0.tar", *good, ("b.heic", b"x"), ("b.cls", b"0"))
    status, text = run("index", "t")
    assert status == 1
    assert "sample 'b' has a label and no image (only .cls, .heic)" in text
    assert not (here / "t" / "index").exists()
    status, text = run("index", "t", "--skip-bad")
    assert status == 0
    assert "left out: 0.tar at byte" in text
