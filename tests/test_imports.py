"""Who may import whom, read from the source, and what ``import fastres`` must do without."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A package imports only from the rows above its own; those of one row are strangers.
LAYERS = (
    ("errors", "files", "version"),
    ("graph",),
    ("backends",),
    ("runtime",),
    ("frontends", "models", "perf"),
    ("formats", "bench", "train"),
    ("batch",),
    ("serving",),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}
KNOW_THE_KERNELS = {"backends", "perf"}
FILE_LINES, KERNEL_FILE_LINES, FUNCTION_LINES, ALL_LINES = 450, 550, 70, 31_366
OPTIONAL = ("triton", "torchvision", "sklearn", "PIL", "timm", "h5py", "keras")


def sources():
    files = sorted((ROOT / "fastres").rglob("*.py"))
    return [p for p in files if "kernels" not in p.parts and p != ROOT / "fastres/__init__.py"]


def package_of(path):
    """The package that a file belongs to, or the module itself at the top."""
    return path.relative_to(ROOT / "fastres").with_suffix("").parts[0]


def runtime_imports(path):
    """``(node, package level, dotted name)`` of each import, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from ((node, 0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node, node.level, name) for name in names)


def imported(path):
    """``(package, module)`` of fastres that a file imports; the module is empty for a package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for _, level, name in runtime_imports(path):
        full = [*parts[: len(parts) - level], *name.split(".")] if level else name.split(".")
        if full[0] == "fastres" and len(full) > 1:
            yield full[1], ".".join(full[2:3])


def test_every_package_has_its_floor():
    assert {package_of(path) for path in sources()} == set(FLOOR)


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    own = package_of(path)
    below = {name for name, floor in FLOOR.items() if floor < FLOOR[own]} | {own}
    if own in KNOW_THE_KERNELS:
        below.add("kernels")
    upwards = {package for package, _ in imported(path)} - below
    assert not upwards, f"{own} imports {sorted(upwards)}, which are not below it"


def test_no_circles_inside_a_package():
    """Modules of one package, in an order in which each imports only those before it."""
    waiting = {}
    for path in sources():
        relative = path.relative_to(ROOT / "fastres").with_suffix("")
        if len(relative.parts) == 2:
            own, module = relative.parts
            inside = {name for package, name in imported(path) if package == own and name}
            waiting[own, module] = {(own, name) for name in inside} - {(own, module)}
    while ready := [key for key, needs in waiting.items() if not needs & waiting.keys()]:
        for key in ready:
            del waiting[key]
    assert not waiting, f"these import each other: {sorted(waiting)}"


def test_a_package_says_what_it_holds_and_exports_nothing():
    for face in sorted((ROOT / "fastres").glob("*/__init__.py")):
        if face.parent.name in ("kernels", "cli", "batch", "serving"):
            continue
        tree = ast.parse(face.read_text())
        assert ast.get_docstring(tree), face
        assert len(tree.body) == 1, f"{face} does more than describe its package"


def test_the_kernels_are_imported_only_when_triton_runs():
    found = [
        (path.name, node.col_offset)
        for path in sources()
        for node, level, name in runtime_imports(path)
        if level and name.split(".")[0] == "kernels"
    ]
    assert found
    at_module_level = [name for name, column in found if column == 0]
    assert not at_module_level


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_the_kernels_know_nothing_of_models(path):
    found = {(level, name.split(".")[0]) for _, level, name in runtime_imports(path)}
    outside = {name for level, name in found if level == 0}
    assert outside <= {"torch", "triton"} | set(sys.stdlib_module_names)
    assert all(level <= len(path.relative_to(ROOT).parts) - 1 for level, _ in found)


def body_lines(function):
    """Lines of a function without its signature and docstring; 0 of one that Triton compiles."""
    if any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
        return 0
    first, *others = function.body
    start = others[0] if others and ast.get_docstring(function) else first
    return function.end_lineno - start.lineno + 1


def test_files_and_functions_stay_small():
    """So that a file can be read at once; what still has to be split only becomes shorter."""
    files = [*sources(), ROOT / "fastres/__init__.py", *(ROOT / "kernels").rglob("*.py")]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    budgets = {
        name: KERNEL_FILE_LINES if name.startswith("kernels/") else FILE_LINES for name in lines
    }
    assert {name: count for name, count in lines.items() if count > budgets[name]} == {}
    functions = [
        (body_lines(node), name, node.name)
        for name, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert [function for function in functions if function[0] > FUNCTION_LINES] == []
    assert sum(lines.values()) <= ALL_LINES


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_fastres_needs_none_of_the_optional_packages():
    """Each is replaced by an import error; a ResNet must still answer on the CPU."""
    block = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))"
    use = (
        "import torch, fastres.models.registry as r; x = torch.ones(1, 3, 32, 32);"
        "print(*r.resnet18(num_classes=7).eval()(x).shape)"
    )
    done = run(f"{block}; import fastres; {use}")
    assert done.stdout.split() == ["1", "7"], done.stderr


def test_importing_fastres_loads_neither_triton_nor_the_command_line():
    done = run(
        "import torch, sys; before = set(sys.modules); import fastres;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    assert done.returncode == 0, done.stderr
    assert not {"triton", "jinja2", "typer", "rich", "torchvision", "sklearn"} & set(
        done.stdout.split()
    )


def test_the_kernels_refuse_a_second_name():
    done = run(
        "from importlib.util import module_from_spec, spec_from_file_location as named;"
        "spec = named('mine.kernels', 'kernels/__init__.py');"
        "spec.loader.exec_module(module_from_spec(spec))"
    )
    assert "import it as 'fastres.kernels'" in done.stderr


@pytest.mark.slow
@pytest.mark.fault(77)
def test_the_kernels_folder_is_not_hugging_faces_package():
    """At the root of a checkout, where transformers asks for a package of the folder's name."""
    pytest.importorskip("transformers")
    done = run(
        "from transformers import ResNetForImageClassification;"
        "from transformers.utils.import_utils import is_kernels_available;"
        "import importlib.metadata as m, importlib.util, kernels;"
        "installed = any(d.name == 'kernels' for d in m.distributions());"
        "assert installed or not is_kernels_available();"
        "assert installed or kernels.__file__ is None;"
        "import fastres.kernels; fastres.kernels.conv2d"
    )
    assert done.returncode == 0, done.stderr


INSTALLED = """
from .layers import Layer
__version__ = "99.1"
def get_kernel(name): return name
"""


@pytest.mark.fault(77)
@pytest.mark.parametrize(
    ("root", "first"),
    [(ROOT, "import fastres.kernels"), (ROOT, "pass"), (ROOT / "fastres", "pass")],
    ids=["ours first", "theirs first", "from the package's folder"],
)
def test_an_installed_package_of_that_name_is_found(first, root, tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(INSTALLED)
    (package / "layers.py").write_text("class Layer: pass")
    (package / "conv.py").write_text("answer = 42")  # a name that the folder has as well
    done = run(
        f"import sys; sys.path[:1] = [{str(root)!r}]; sys.path.append({str(tmp_path)!r});"
        f"sys.path.append({str(ROOT)!r}); {first}; import kernels;"
        "from kernels import get_kernel, Layer; from kernels.layers import Layer as same;"
        "from kernels.conv import answer;"
        "assert Layer is same and answer == 42 and kernels.__version__ == '99.1';"
        f"assert kernels.__file__ == {str(package / '__init__.py')!r};"
        "import fastres.kernels; assert fastres.kernels.conv2d is not None"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.fault(77)
def test_without_one_nothing_of_ours_goes_by_that_name():
    """A second copy of a kernel would register its custom operator twice."""
    done = run("import kernels; assert not hasattr(kernels, '__version__'); import kernels.conv")
    assert "ModuleNotFoundError: No module named 'kernels.conv'" in done.stderr
    done = run("from kernels import conv2d")
    assert "ImportError: cannot import name 'conv2d'" in done.stderr


@pytest.mark.fault(77)
def test_a_second_checkout_is_not_taken_for_an_installed_package(tmp_path):
    """Each would step aside for the other, without end."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    done = run(
        f"import sys; sys.path.append({str(tmp_path)!r});"
        "import kernels; assert not hasattr(kernels, '__version__')"
    )
    assert done.returncode == 0, done.stderr
