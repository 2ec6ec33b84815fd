"""``elastic-megatron --check``: what is found, missing or broken is told apart, and nothing it imports can stop it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_megatron.cli import main
from elastic_megatron.runtime import kernels
from elastic_megatron.runtime.kernels import KERNELS, Finding, Kernel, devices, look, report

ROOT = Path(__file__).parents[2]
# what transformer_engine 2.20.2 raises without its core package, shortened
CORE = metadata.version("megatron-core")
EMPTY = "Found empty `transformer-engine` meta package installed. Install it with framework extensions"


def install(folder: Path, distribution: str | None, version: str = "1.0", **modules: str) -> None:
    """A distribution with these top-level modules; without a name, the modules alone."""
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    if distribution is not None:
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


def kernel(*modules: str, distribution: str = "kernel-of-a-test") -> Kernel:
    return Kernel("Kernel", distribution, modules, "speed", "it is slow")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_what_imports_is_found_with_its_version(site: Path) -> None:
    install(site, "kernel-of-a-test", "1.2.post3", kernel_found="")
    assert look(kernel("kernel_found")) == Finding("1.2.post3", "found")


def test_what_imports_is_found_without_metadata_too(site: Path) -> None:
    install(site, None, kernel_bare="")
    assert look(kernel("kernel_bare")) == Finding(None, "found")


def test_what_is_not_there_is_missing() -> None:
    assert look(kernel("kernel_nowhere.inner")) == Finding(None, "missing")


def test_a_package_without_its_compiled_module_is_broken_not_missing(site: Path) -> None:
    """Apex, built as Python only."""
    install(site, "kernel-of-a-test")
    found = look(kernel("kernel_extension"))
    assert found == Finding(
        "1.0", "does not import", "ModuleNotFoundError: No module named 'kernel_extension'"
    )


def test_a_package_that_lacks_another_is_broken_not_missing(site: Path) -> None:
    install(site, None, kernel_needy="import kernel_of_somebody_else")
    found = look(kernel("kernel_needy"))
    assert found.state == "does not import" and "kernel_of_somebody_else" in found.reason


@given(
    st.sampled_from([ImportError, RuntimeError, OSError, AssertionError, AttributeError, KeyError]),
    st.lists(st.text()),
)
def test_no_exception_gets_through_and_its_last_line_is_the_reason(
    kind: type[Exception], lines: list[str]
) -> None:
    error = kind("\n".join(lines)) if lines else kind()
    with patch.object(kernels, "import_module", side_effect=error):
        found = look(kernel("kernel_that_raises"))
    assert found.state == "does not import" and len(found.reason.splitlines()) == 1
    assert found.reason.startswith(kind.__name__)
    written = str(error).strip().splitlines()
    assert not written or written[-1].strip() in found.reason


def test_the_report_has_a_row_for_each_kernel_and_a_note_for_each_that_is_not_found(site: Path) -> None:
    install(site, "kernel-of-a-test", "7.5", kernel_seen="")
    install(site, "broken-kernel", kernel_broken="raise OSError('first line\\nlibcudart.so.13: not there')")
    seen = kernel("kernel_seen")
    broken = Kernel("Broken", "broken-kernel", ("kernel_broken",), "nothing", "all is well")
    gone = Kernel("Gone", "gone-kernel", ("kernel_gone",), "little", "something is slow")
    text = report((seen, broken, gone))
    facts, table, notes = text.split("\n\n")
    assert [line.split()[0] for line in facts.splitlines()] == [
        "elastic-megatron", "Python", "torch", "megatron-core", "devices",
    ]  # fmt: skip
    assert torch.__version__ in facts and sys.version.split()[0] in facts
    assert [line.split() for line in table.splitlines()] == [
        ["optional", "version", "state", "brings"],
        ["Kernel", "7.5", "found", "speed"],
        ["Broken", "1.0", "does", "not", "import", "nothing"],
        ["Gone", "-", "missing", "little"],
    ]
    assert notes.splitlines() == [
        "Broken does not import: OSError: libcudart.so.13: not there",
        "  without it: all is well",
        "Gone is missing: something is slow",
    ]


def test_the_module_itself_imports_the_standard_library_only() -> None:
    tree = ast.parse(Path(kernels.__file__).read_text())
    modules = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    modules |= {str(n.module) for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert {m for m in modules if m.split(".")[0] not in sys.stdlib_module_names} == {"elastic_megatron"}


# ------------------------------------------------------------------------------------------ devices


def gpu(name: str, gib: float, capability: str) -> SimpleNamespace:
    major, minor = capability.split(".")
    return SimpleNamespace(name=name, total_memory=int(gib * 2**30), major=int(major), minor=int(minor))


def test_equal_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [gpu("NVIDIA H200", 139.8, "9.0")] * 7 + [gpu("NVIDIA B200", 178.4, "10.0")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(there))
    monkeypatch.setattr(torch.cuda, "get_device_properties", there.__getitem__)
    assert devices() == (
        "7 x NVIDIA H200, 139.8 GiB, compute capability 9.0; 1 x NVIDIA B200, 178.4 GiB, compute capability 10.0"
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Found no NVIDIA driver on your system. Please check that you have one.\nOr not."),
            "Found no NVIDIA driver on your system",
        ),
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_without_a_gpu_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def init() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert devices() == f"none, the CPU computes ({reason})"


# ------------------------------------------------------------------------------------------ the command


def check(*paths: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "elastic_megatron.cli", "--check"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_check_prints_the_report_and_exits_with_0(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--check"])
    assert stop.value.code == 0
    out = capfd.readouterr().out
    rows = {line.split("  ")[0] for line in out.splitlines()}
    assert {kernel.name for kernel in KERNELS} <= rows
    assert out == report() + "\n"


def test_the_empty_meta_package_is_told_and_named_as_megatron_s_trouble_too(tmp_path: Path) -> None:
    source = f"print('noise')\nraise RuntimeError({EMPTY!r})"
    install(tmp_path, "transformer-engine", "2.20.2", transformer_engine=source)
    done = check(tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(
        line.split()[:2] == ["megatron-core", "0.19.2"] and "does not import" in line for line in lines
    )
    assert any(line.startswith("Transformer Engine    2.20.2   does not import") for line in lines)
    for name in ("megatron-core", "Transformer Engine"):
        note = lines.index(f"{name} does not import: RuntimeError: {EMPTY}")
        assert "empty" in lines[note + 1] and "[core_cu13,pytorch]" in lines[note + 1]
    assert "noise" not in done.stdout


def test_a_broken_torch_is_one_line(tmp_path: Path) -> None:
    install(tmp_path, None, torch="raise OSError('libcudart.so.13: cannot open shared object file')")
    done = check(tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: torch does not import: libcudart.so.13: cannot open shared object file\n"


def test_the_page_on_gpus_shows_this_table() -> None:
    page = (ROOT / "docs" / "install_gpu.md").read_text(encoding="utf-8")
    for kernel in KERNELS:
        assert any(kernel.name in line and line.endswith(kernel.brings) for line in page.splitlines())
