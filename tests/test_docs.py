"""What the documentation names is there: files, folders, modules, tests, commands and links."""

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "data", "launcher", "slurm", "trainers")
FOLDERS = (*ROOMS, "tests", "docs", "benchmarks", "findings", "typings", ".ci")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("findings/*.md")])
_FOLDER = "|".join(map(re.escape, FOLDERS))
PATH = re.compile(rf"(?:{_FOLDER})/[\w./*-]*")
# In code and comments, where `data/train` may be anything: only what ends like a file of ours.
FILE = re.compile(rf"(?<![\w./~*-])(?:{_FOLDER})/[\w./-]+\.(?:py|md|sbatch|html)\b")
BARE = re.compile(r"(?<![\w./-])\w+\.py\b")
MODULE = re.compile(r"\bbigbatch(?:\.[a-z_]\w*)+")
TEST = re.compile(r"(test_\w+)(?:\.py)?")
TIMM_MODELS = {"test_resnet", "test_vit"}  # small ones, for tests
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(page: str) -> Iterator[str]:
    """Every word that stands as code in a page, in a line or in a block of its own."""
    for block in FENCE.findall(page):
        yield from block.split()
    rest = FENCE.sub("", page)
    for line in re.findall(r"^ {4}.*", rest, re.M):
        yield from line.split()
    for span in re.findall(r"`([^`]+)`", rest):
        yield from span.split()


def path_is_there(path: str) -> bool:
    """Whether a path, in which *, NAME and DATE stand for anything, is in this repository."""
    return any(ROOT.glob(re.sub("NAME|DATE", "*", path).rstrip("/")))


def module_is_there(name: str) -> bool:
    """Whether `bigbatch.room.module`, or something inside it, is in this repository."""
    folder = ROOT
    for part in name.split(".")[1:]:
        if (folder / f"{part}.py").is_file():
            return True
        if not (folder / part).is_dir():  # then the package itself must know it
            init = folder / "__init__.py"
            return init.is_file() and re.search(rf"\b{part}\b", init.read_text()) is not None
        folder /= part
    return True


@cache
def known_tests() -> set[str]:
    """The names of all files and functions of tests."""
    found = set()
    for path in ROOT.glob("tests/**/test_*.py"):
        found.update((path.stem, *re.findall(r"^\s*def (test_\w+)", path.read_text(), re.M)))
    return found


def missing(page: str) -> list[str]:
    """What a page names as code and is not there."""
    found = []
    for word in code(page):
        name, _, test = word.rstrip(".,:;)").lstrip("(").partition("::")
        if PATH.fullmatch(name) and not path_is_there(name):
            found.append(name)
        found += [module for module in MODULE.findall(name) if not module_is_there(module)]
        for match in filter(None, map(TEST.fullmatch, (name, test.partition("[")[0]))):
            if match[1] not in known_tests() | TIMM_MODELS:
                found.append(match[0])
    return found


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_what_a_page_names_is_there(page: Path) -> None:
    assert missing(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    dead = []
    for link in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (heading and heading not in headings(target)):
            dead.append(link)
    assert dead == []


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_a_name_that_is_not_there_is_found() -> None:
    page = (
        "Add it to `trainers/losses/build.py` and `trainers/losses/no_such.py`, `data/augment/` "
        "and `no_such_folder`; `bigbatch.data.order`, `bigbatch.data.no_such`, see\n"
        "`tests/data/test_order.py::test_golden_samples`, `tests/data/test_order.py::test_none`, "
        "`test_no_such`.\n```sh\npython benchmarks/no_such.py --quick\n```\n\n    docs/no_such.md\n"
    )
    assert sorted(missing(page)) == [
        "benchmarks/no_such.py",
        "bigbatch.data.no_such",
        "docs/no_such.md",
        "test_no_such",
        "test_none",
        "trainers/losses/no_such.py",
    ]


def test_where_to_change_what_names_files() -> None:
    """In that table every word of code is a path, or a file in the folder of the one before."""
    page = (ROOT / "docs/design.md").read_text()
    table = page.partition("## Where to change what")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 12
    dead = []
    for row in rows:
        folder = ROOT
        for span in re.findall(r"`([^`]+)`", row.partition(" | ")[2]):
            path = ROOT / span if "/" in span else folder / span
            if not path.exists():
                dead.append(f"{span} in: {row}")
            folder = path if span.endswith("/") else path.parent
    assert dead == []


def test_each_step_of_contributing_names_what_its_files_hold() -> None:
    """A word of code in a numbered step, such as `build_loss`, stands in a file that it names."""
    recipes = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Add ...")[2]
    steps = re.findall(r"^\d\. (.+?)(?=\n\d\. |\n\n)", recipes, re.M | re.S)
    assert len(steps) >= 24
    unknown = []
    for step in steps:
        spans = re.findall(r"`([^`]+)`", step)
        files = [ROOT / span for span in spans if (ROOT / span).is_file()]
        words = set(re.findall(r"\w+", " ".join(file.read_text() for file in files)))
        unknown += [span for span in spans if re.fullmatch(r"\w+", span) and span not in words]
    assert unknown == []


def test_the_folders_of_the_design_are_the_packages() -> None:
    """design.md's list of folders names every package once, and nothing else."""
    page = (ROOT / "docs/design.md").read_text()
    block = page.partition("## Folders")[2].partition("\n## ")[0]
    lines = re.findall(r"^    ( *)(\w+)/ +\S", block, re.M)
    named, room = [], ""
    for indent, name in lines:
        room = room if indent else name
        named.append(f"bigbatch.{room}.{name}" if indent else f"bigbatch.{name}")
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = {
        ".".join(("bigbatch", *init.parent.relative_to(ROOT).parts))
        for room in ROOMS
        for init in (ROOT / room).rglob("__init__.py")
    }
    assert sorted(named) == sorted(packages) == sorted(folders)


def test_tests_mirror_the_rooms() -> None:
    """Each folder of tests is named after the folder that it tests."""
    beside = {"helpers", "golden", "__pycache__"}  # what tests share, and what they compare with
    strangers = [
        relative(folder)
        for folder in sorted((ROOT / "tests").rglob("*/"))
        if folder.is_dir()
        and not beside.intersection(folder.parts)
        and not (ROOT / folder.relative_to(ROOT / "tests")).is_dir()
    ]
    assert strangers == []


def test_files_and_modules_that_code_and_comments_name_are_there() -> None:
    sources = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".pre-commit-config.yaml"]
    for folder in (*ROOMS, "tests", "benchmarks"):
        for suffix in ("py", "yaml", "sbatch", "html", "sh"):
            sources += (ROOT / folder).rglob(f"*.{suffix}")
    files = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    dead = []
    for source in sorted({*sources} - {Path(__file__)}):
        text = source.read_text()
        names = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
        names += [name for name in MODULE.findall(text) if not module_is_there(name)]
        if relative(source).startswith((*ROOMS, "tests/helpers")):  # elsewhere, also peers' files
            names += [name for name in BARE.findall(text) if name not in files]
        dead += [f"{relative(source)}: {name}" for name in names]
    assert dead == []


def test_pre_commit_runs_the_gates_of_make_check() -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.partition("\ncheck: setup\n")[2].partition("\n\n")[0]
    gates = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repo,) = config["repos"]
    assert repo["repo"] == "local"
    assert [hook["entry"] for hook in repo["hooks"]] == gates
    assert all(hook["pass_filenames"] is False for hook in repo["hooks"])


def test_every_command_is_in_the_readme() -> None:
    from bigbatch.launcher.cli.main import cli

    table = (ROOT / "README.md").read_text().partition("## Commands")[2].partition("\n## ")[0]
    cells = [row.split(" | ")[0] for row in table.splitlines() if row.startswith("| `")]
    named = re.findall(r"`(?:bigbatch )?([a-z-]+)", "\n".join(cells))
    assert sorted(named) == sorted(cli.commands)


def test_rooms_and_files_stay_small() -> None:
    """As CONTRIBUTING says of files; and a folder that fills up wants rooms of its own."""
    modules = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert [relative(m) for m in modules if len(m.read_text().splitlines()) > 400] == []
    assert len(list((ROOT / "trainers").glob("*.py"))) <= 8
    assert len(list((ROOT / "launcher").glob("*.py"))) <= 14
