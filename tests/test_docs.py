"""The documentation: links lead somewhere, names and messages exist, code runs."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import patch
from urllib.parse import unquote

import pytest
import torch

import fastres

ROOT = next(p for p in Path(__file__).parents if (p / "pyproject.toml").exists())
OLD = ("fault-matrix.md", "mutants.md", "CHANGELOG.md", "NOTES.md")  # some of it has gone since
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]
)
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```|^    .*?$|`[^`\n]+`", re.M | re.S)


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text("utf-8"))
    for target in LINK.findall(text):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = unquote(target).partition("#")
        found = page.parent / name if name else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


NAME = re.compile(r"\bfastres((?:\.\w+)+)(?!\w*/)")
FILES = (".md", ".py", ".onnx", ".html", ".safetensors")


def exists(dotted: str) -> bool:
    """Whether ``fastres`` + dotted is a module or what can be reached from one."""
    from importlib import import_module

    found, path = fastres, "fastres"
    for part in dotted.strip(".").split("."):
        path = f"{path}.{part}"
        try:
            found = import_module(path)
        except ImportError:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
    return True


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in OLD], ids=lambda p: p.name)
def test_names_exist(page):
    names = set(NAME.findall(page.read_text("utf-8")))
    assert {name for name in names if not exists(name)} - {".report", ".report.lines"} == set()


PLACE = re.compile(r"`((?:fastres|kernels|tests|benchmarks|docs|examples|\.ci)/[\w./-]*)[`:]")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in OLD], ids=lambda p: p.name)
def test_files_exist(page):
    places = set(PLACE.findall(page.read_text("utf-8"))) - {"fastres/kernels"}  # a checkout's link
    assert {place for place in places if not (ROOT / place).exists()} == set()


def test_the_modules_of_the_architecture_exist():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    layers = {path.parent.name for path in (ROOT / "fastres").glob("*/__init__.py")} - {"kernels"}
    assert set(re.findall(r"^\| \d \| `(\w+)/`", text, re.M)) == layers
    named = re.findall(rf"`((?:{'|'.join(layers)})(?:\.\w+)+)`", text)
    assert len(named) > 10
    assert {name for name in named if not exists(name)} == set()


def test_contributing_shows_a_kernels_class_as_it_is():
    (shown, _) = blocks(ROOT / "CONTRIBUTING.md")
    assert shown in (ROOT / "fastres" / "backends" / "fused.py").read_text("utf-8")


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    listed = re.findall(r"^\.\. auto(?:function|class|exception):: fastres\.(\w+)$", text, re.M)
    assert sorted(listed) == sorted(fastres.__all__)


def rows(page: Path) -> list[str]:
    """The code in the first cell of each row of a page's tables."""
    return re.findall(r"^\| `([^`]+)` \|", page.read_text("utf-8"), re.M)


def said() -> str:
    """What users can meet: the snapshot of the errors, and the texts in the source."""
    (snapshot,) = (ROOT / "tests").rglob("snapshot.txt")
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "fastres").rglob("*.py"))
    return snapshot.read_text("utf-8") + re.sub(r'"\s*\n\s*f?"', "", sources)


def test_troubleshooting_quotes_messages_that_exist():
    text, quoted = said(), rows(ROOT / "docs" / "troubleshooting.md")
    assert len(quoted) > 50
    parts = {part.strip() for message in quoted for part in re.split(r"\.\.\.|: ", message)}
    assert {part for part in parts if part not in text} == set()


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


@pytest.mark.slow
def test_the_readmes_ten_lines_run(capsys):
    """On small images and without the download; everything else as it is written."""
    pytest.importorskip("torchvision")
    (code,) = blocks(ROOT / "README.md")
    assert len([line for line in code.splitlines() if line]) <= 10
    for written, here in (("224, 224", "32, 32"), ('weights="IMAGENET1K_V2"', "")):
        assert written in code
        code = code.replace(written, here)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "conv 7x7/2 3->64 + bias + ReLU" in out
    assert "torch.Size([8, 1000]) Verification(ok=True" in out


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_in_pages_compiles(page):
    for code in blocks(page):
        compile(code, str(page), "exec")


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {fastres.__version__}\n" in text


@pytest.mark.parametrize("name", ["quickstart.py", "optimize_timm.py"])
def test_examples_run(name, capsys):
    if "timm" in name:
        pytest.importorskip("timm")
    path = ROOT / "examples" / name
    arguments = [str(path), "--size", "32"]
    if "timm" in name:
        arguments += ["--model", "resnet10t"]
    with patch("sys.argv", arguments), torch.random.fork_rng():
        exec(compile(path.read_text("utf-8"), str(path), "exec"), {"__name__": "__main__"})
    assert "allowed" in capsys.readouterr().out
