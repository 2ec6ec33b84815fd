"""The house: imports go downward only, CUDA lives in one place, files and functions stay readable."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "elastic_megatron"
FILES = sorted(p for p in ROOT.rglob("*.py"))

# floor -> the floors it may import; the console script, its commands and the quickstart are the roof
LEAVES = {"errors", "files"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "space": LEAVES,
    "runtime": LEAVES,
    "data": LEAVES,
    "report": LEAVES | {"space", "cost", "quantization", "checkpoint"},
    "recipe": LEAVES | {"space"},
    "cost": LEAVES | {"space", "quantization"},
    "ops": LEAVES | {"space", "cost"},
    "quantization": LEAVES,
    "blocks": LEAVES | {"space", "cost", "ops", "runtime"},
    "importance": LEAVES | {"space", "cost", "ops", "blocks"},
    "router": LEAVES | {"space", "cost", "ops"},
    "checkpoint": LEAVES
    | {"space", "cost", "ops", "runtime", "quantization", "blocks", "importance", "recipe"},
    "conversion": LEAVES | {"space", "cost", "quantization", "checkpoint"},
    "preflight": LEAVES | {"space", "recipe", "cost", "checkpoint"},
    "slurm": LEAVES | {"space", "recipe", "cost", "checkpoint"},
    "training": LEAVES
    | {"space", "cost", "ops", "runtime", "recipe", "data", "quantization", "blocks", "importance", "router"}
    | {"checkpoint"},
    "serving": LEAVES | {"space", "ops", "runtime", "quantization", "data", "blocks", "checkpoint"},
    "integrations": LEAVES
    | {"space", "cost", "ops", "runtime", "recipe", "data", "blocks", "importance", "checkpoint", "training"},
}
ROOF = {"cli", "commands", "quickstart"}
# Floor 0 and the recipe are read by tools that have no torch.
WITHOUT_TORCH = {"errors", "files", "space", "recipe", "cost", "preflight", "slurm"}
# The plain entry points of a floor's own command live beside it; they are part of the roof.
ENTRY_POINTS = {"data/cli.py", "report/cli.py"}


def floor(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "cli" if path.relative_to(ROOT).as_posix() in ENTRY_POINTS else parts[0]


def imported(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(dotted module, line, whether only for type checking) of every import, ours made absolute."""
    package = ["elastic_megatron", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        skip = id(node) in typing_only
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, skip) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "elastic_megatron":
                yield from ((f"{module}.{alias.name}", node.lineno, skip) for alias in node.names)
            else:
                yield module, node.lineno, skip


def test_every_package_has_a_floor() -> None:
    known = {*MAY_IMPORT, *ROOF, "__init__"}
    assert {p.relative_to(ROOT).with_suffix("").parts[0] for p in FILES} <= known


def test_contributing_names_every_floor_below_those_that_it_may_import() -> None:
    page = (ROOT.parent / "CONTRIBUTING.md").read_text().split("## Floors")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    height = {n.removesuffix(".py"): i for i, row in enumerate(rows) for n in re.findall(r"`([\w.]+)`", row)}
    assert height.keys() == MAY_IMPORT.keys() | ROOF
    upward = [(own, f) for own, below in MAY_IMPORT.items() for f in below if height[f] > height[own]]
    assert not upward and all(height[f] == len(rows) - 1 for f in ROOF)


def test_floors_are_acyclic() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {f for f, below in MAY_IMPORT.items() if f not in done and below <= done}
        assert ready, f"a cycle among {set(MAY_IMPORT) - done}"
        done |= ready


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_downward(path: Path) -> None:
    own = floor(path)
    if own in ROOF or own == "__init__":
        return
    for module, line, _ in imported(path):
        parts = module.split(".")
        if parts[0] == "elastic_megatron" and len(parts) > 1 and parts[1] not in (own, "__version__"):
            assert parts[1] in MAY_IMPORT[own], f"{path}:{line}: {own} imports {module}"


def test_floors_without_torch_have_none() -> None:
    """At import, that is: cost formulas meet tensors but make none. In a fresh interpreter."""
    import subprocess

    modules = ", ".join(f"elastic_megatron.{f}" for f in sorted(WITHOUT_TORCH))
    heavy = "{'torch', 'megatron', 'numpy', 'transformers'}"
    code = f"import sys, {modules}; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr


def test_quantization_needs_torch_only() -> None:
    """Its formats need not even that: a login node may ask how large a quantised model is."""
    for path in FILES:
        if floor(path) == "quantization":
            names = {module.split(".")[0] for module, _, _ in imported(path)}
            allowed = {"elastic_megatron", "torch"} - ({"torch"} if path.name == "formats.py" else set())
            assert names <= allowed | set(sys.stdlib_module_names), path


def test_space_needs_the_standard_library_only() -> None:
    for path in FILES:
        if floor(path) == "space":
            for module, line, _ in imported(path):
                top = module.split(".")[0]
                assert top == "elastic_megatron" or top in sys.stdlib_module_names, f"{path}:{line}: {module}"


def code_without_docstrings(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return tree


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_cuda_is_named_in_runtime_only(path: Path) -> None:
    """No ``torch.cuda``, no ``.cuda()``, no ``"cuda"`` device: devices come from tensors."""
    if floor(path) == "runtime":
        return
    for node in ast.walk(code_without_docstrings(path)):
        if isinstance(node, ast.Attribute):
            assert node.attr != "cuda", f"{path}:{node.lineno}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value != "cuda" and not node.value.startswith("cuda:"), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_modelopt_is_named_in_one_place(path: Path) -> None:
    """It takes seconds to import and patches what it meets: only training on quantised leaves does."""
    if path.relative_to(ROOT).as_posix() != "training/quantizers.py":
        for module, line, _ in imported(path):
            assert module.split(".")[0] != "modelopt", f"{path}:{line}"


LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_short(path: Path) -> None:
    """300 lines a file, 60 a function without its docstring; exceptions are listed above, with reasons."""
    name, text = path.relative_to(ROOT).as_posix(), path.read_text()
    assert name in LONG_FILES or text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                first = node.body[0]
                length -= (first.end_lineno or first.lineno) - first.lineno + 1
            assert f"{name}:{node.name}" in LONG_FUNCTIONS or length <= 60, (
                f"{name}:{node.name} has {length} lines"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_is_left_to_do_and_only_the_roof_prints(path: Path) -> None:
    text = path.read_text()
    for word in ("TODO", "FIXME", "XXX", "HACK", "breakpoint(", "pdb"):
        assert word not in text, word
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert floor(path) in ROOF or "stderr" in ast.unparse(node), (
                f"{path}:{node.lineno} prints to stdout"
            )
