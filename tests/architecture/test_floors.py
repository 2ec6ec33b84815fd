"""The house: imports go downward only, CUDA lives in one place, files and functions stay readable."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2] / "elastic_megatron"
FILES = sorted(ROOT.rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 300, 60

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


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def imported(path: Path) -> list[tuple[str, int]]:
    """(dotted module, line) of every import, ours made absolute."""
    package = ["elastic_megatron", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
            found += [(n, node.lineno) for n in (names if module == "elastic_megatron" else [module])]
    return found


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


def test_imports_go_downward() -> None:
    def upward(path: Path) -> Iterator[str]:
        own = floor(path)
        for module, line in imported(path) if own in MAY_IMPORT else ():
            package, _, rest = module.partition(".")
            below = rest.partition(".")[0]
            if package == "elastic_megatron" and below not in ("", own, "__version__", *MAY_IMPORT[own]):
                yield f"{name_of(path)}:{line}: {own} imports {module}"

    assert [found for path in FILES for found in upward(path)] == []


def test_floors_without_torch_have_none() -> None:
    """At import, that is: cost formulas meet tensors but make none. In a fresh interpreter."""
    modules = ", ".join(f"elastic_megatron.{f}" for f in sorted(WITHOUT_TORCH))
    heavy = "{'torch', 'megatron', 'numpy', 'transformers'}"
    code = f"import sys, {modules}; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr


def test_low_floors_need_little() -> None:
    """``space`` and ``files`` the standard library, ``quantization`` torch, and its formats not even that: a login node
    may ask how large a quantised model is. ModelOpt takes seconds to import and patches what it meets: only training on
    quantised leaves names it."""

    def allowed(path: Path, top: str) -> bool:
        own = floor(path)
        if own in ("space", "files", "quantization"):
            more = {"torch"} if own == "quantization" and path.name != "formats.py" else set()
            return top in {"elastic_megatron"} | sys.stdlib_module_names | more
        return top != "modelopt" or name_of(path) == "training/quantizers.py"

    assert [
        f"{name_of(path)}:{line}: {module}"
        for path in FILES
        for module, line in imported(path)
        if not allowed(path, module.partition(".")[0])
    ] == []


def docstring_of(node: ast.AST) -> ast.stmt | None:
    documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    return node.body[0] if documented and ast.get_docstring(node) is not None else None


def test_cuda_is_named_in_runtime_only() -> None:
    """No ``torch.cuda``, no ``.cuda()``, no ``"cuda"`` device: devices come from tensors."""

    def named(path: Path) -> Iterator[str]:
        prose = {id(d.value) for n in ast.walk(tree_of(path)) if isinstance(d := docstring_of(n), ast.Expr)}
        for node in ast.walk(tree_of(path)):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in prose else ""
            if (isinstance(node, ast.Attribute) and node.attr == "cuda") or (
                isinstance(text, str) and text.partition(":")[0] == "cuda" and isinstance(node, ast.Constant)
            ):
                yield f"{name_of(path)}:{node.lineno}"

    assert [found for path in FILES if floor(path) != "runtime" for found in named(path)] == []


def test_files_and_functions_stay_short() -> None:
    """300 lines a file, 60 a function without its docstring."""

    def long(path: Path) -> Iterator[str]:
        if (lines := path.read_text().count("\n")) > MOST_LINES:
            yield f"{name_of(path)} has {lines} lines"
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if (first := docstring_of(node)) is not None:
                    length -= (first.end_lineno or first.lineno) - first.lineno + 1
                if length > MOST_LINES_OF_A_FUNCTION:
                    yield f"{name_of(path)}:{node.name} has {length} lines"

    assert [found for path in FILES for found in long(path)] == []


def test_nothing_is_left_to_do_and_only_the_roof_prints() -> None:
    words = ("TODO", "FIXME", "XXX", "HACK", "breakpoint(", "pdb")

    def left(path: Path) -> Iterator[str]:
        yield from (f"{name_of(path)}: {word}" for word in words if word in path.read_text())
        for node in ast.walk(tree_of(path)) if floor(path) not in ROOF else ():
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "print" and "stderr" not in ast.unparse(node):
                yield f"{name_of(path)}:{node.lineno} prints to stdout"

    assert [found for path in FILES for found in left(path)] == []
