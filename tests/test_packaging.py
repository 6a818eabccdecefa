"""The package as it is installed: names in pyproject.toml, and what wheel and sdist contain."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = ("fastres", "kernels", "tests", "benchmarks", "docs", "examples", ".ci") + (
    *("pyproject.toml", "MANIFEST.in", "Makefile", ".pre-commit-config.yaml"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "SECURITY.md", "CITATION.cff"),
)
CACHES = shutil.ignore_patterns("__pycache__", "*.egg-info")
LIGHT = ("numpy", "safetensors", "filelock", "jinja2", "typer", "rich")
"""What is installed quickly enough to be tried at its lowest version as well."""


def modules_in(root: Path) -> set[str]:
    """Archive names of every Python file of the tree: kernels/ counts as fastres/kernels/."""
    ours = {p for p in (root / "fastres").rglob("*.py") if "kernels" not in p.parts}
    names = {p.relative_to(root).as_posix() for p in ours}
    kernels = (root / "kernels").rglob("*.py")
    return names | {f"fastres/{p.relative_to(root).as_posix()}" for p in kernels}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist, built from a copy so that the checkout stays clean."""
    setuptools = int(metadata.version("setuptools").split(".")[0])
    if setuptools < 77:
        pytest.skip(f"setuptools {setuptools} is older than the 77 that pyproject.toml asks for")
    pytest.importorskip("build", reason="the build frontend is not installed")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=CACHES)
        else:
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    subprocess.run(command, check=True, capture_output=True)
    return out


def test_packages_in_pyproject_are_those_of_the_tree():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == {str(Path(name).parent).replace("/", ".") for name in modules_in(ROOT)}


def test_the_extras_that_messages_advise_exist():
    sources = "".join(path.read_text() for path in (ROOT / "fastres").rglob("*.py"))
    advised = set(re.findall(r"install fastres\[(\w+)\]", sources))
    assert {"onnx", "vision"} <= advised
    assert advised <= set(PROJECT["project"]["optional-dependencies"])


def floors(requirements: list[str]) -> dict[str, str]:
    """The lowest version that each requirement allows; the first where a name comes twice."""
    found = [re.match(r"([\w-]+)(?:[>=]=([\d.]+))?", line) for line in requirements]
    return {match[1]: match[2] for match in reversed(found)}


@pytest.mark.fault(76, 78)
def test_what_every_user_installs_is_torch_and_little_else():
    """Triton, 0.7 GB, is torch's own requirement where torch is for CUDA."""
    lowest = floors(PROJECT["project"]["dependencies"])
    assert set(lowest) == {"torch", *LIGHT}
    assert all(lowest.values())
    assert floors(PROJECT["project"]["optional-dependencies"]["triton"]).keys() == {"triton"}


@pytest.mark.fault(76)
def test_continuous_integration_tries_the_lowest_versions():
    lines = (ROOT / ".ci" / "lowest.txt").read_text().splitlines()
    tried = floors([line for line in lines if not line.startswith("#")])
    allowed = floors(PROJECT["project"]["dependencies"])
    for name in LIGHT:  # 13 and 13.0.0 are the same version
        assert re.sub(r"(\.0)+$", "", tried[name]) == re.sub(r"(\.0)+$", "", allowed[name])
    assert "click" in tried
    assert ".ci/lowest.txt" in (ROOT / ".ci" / "run").read_text()


def commands() -> list[tuple[str, ...]]:
    """The words of each command of the command line, of groups too."""
    from typer.main import get_command

    from fastres.cli import app

    def below(command, words: tuple[str, ...]) -> list[tuple[str, ...]]:
        inner = getattr(command, "commands", {}).items()
        return [words, *(path for name, c in inner for path in below(c, (*words, name)))]

    return below(get_command(app), ())


@pytest.mark.fault(76)
def test_every_command_prints_its_help(capsys):
    """With the installed typer and click, whichever they are."""
    from fastres.cli import run

    assert {("bench",), ("report", "compare")} <= set(commands())
    for words in commands():
        assert run([*words, "--help"]) == 0, words
        assert "Usage: " + " ".join(("fastres", *words)) in capsys.readouterr().out


def test_the_link_to_the_kernels_is_relative():
    assert (ROOT / "fastres" / "kernels").readlink() == Path("../kernels")


def test_the_wheel_holds_each_module_once_and_nothing_outside_fastres(built):
    (wheel,) = built.glob("*.whl")
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert len(names) == len(set(names))
    assert {n for n in names if n.endswith(".py")} == modules_in(ROOT)
    assert {n for n in names if not n.endswith(".py")} == {
        "fastres/py.typed",
        "fastres/assets/digits.safetensors",
        "fastres/bench/report.html.jinja",
        "fastres/serving/page.html",
    }


def test_the_sdist_holds_the_kernels_once_where_pyproject_says(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    modules = {n for n in names if n.endswith(".py") and n.startswith(("fastres/", "kernels/"))}
    assert {n if n.startswith("fastres") else f"fastres/{n}" for n in modules} == modules_in(ROOT)
    assert not [n for n in modules if n.startswith("fastres/kernels")]
    roots = {Path(name).parts[0] for name in names if name}
    assert set(SOURCES) <= roots
    assert "fastres/bench/report.html.jinja" in names


@pytest.mark.sweep
@pytest.mark.fault(78)
@pytest.mark.slow
def test_the_tests_of_the_sdist_run(built, tmp_path):
    """All are collected; those of a few files, which need conftest and helpers, run."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS")}

    def tests(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    here = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    collected = tests("--collect-only")
    assert {name for name in here if f"/{name}" not in collected} == set()
    assert "failed" not in tests(
        "tests/test_tiny.py", "tests/graph/test_fold.py", "-k", "not keras"
    )


def test_the_wheel_names_its_licence_extras_and_command(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        info = next(n for n in archive.namelist() if n.endswith("/METADATA")).rpartition("/")[0]
        told = archive.read(f"{info}/METADATA").decode()
        commands = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    lines = told.splitlines()
    assert {"License-Expression: BSD-3-Clause", "Requires-Python: >=3.10"} <= set(lines)
    assert "Requires-Dist: torch>=2.11" in lines
    triton = [line for line in lines if line.startswith("Requires-Dist: triton")]
    assert triton
    assert all("extra ==" in line for line in triton)
    extras = {line.partition(": ")[2] for line in lines if line.startswith("Provides-Extra")}
    assert {"vision", "train", "demo", "docs", "dev"} <= extras
    assert "fastres = fastres.cli:main" in commands


def test_the_installed_wheel_runs_away_from_the_checkout(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import fastres, pathlib;"
        "print(pathlib.Path(fastres.__file__).parents[1].name, fastres.__version__);"
        "from fastres.models.digits import load_digits_model; load_digits_model();"
        "from fastres.bench.report import Report; Report.now('t').to_html()"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "site"
