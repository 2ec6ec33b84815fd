"""The Dockerfile and its context, checked without a container engine: rules, pins, and the Python inside it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import packaging
import pytest
from dockerfile_lint import RULES, Instruction, lint, parse
from packaging.requirements import Requirement

from elastic_megatron.runtime.kernels import KERNELS

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
OURS = parse(SOURCE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED = {p["name"]: p["version"] for p in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
IGNORE = (ROOT / ".dockerignore").read_text().splitlines()

GOOD = """\
ARG TAG=1.2
FROM base:${TAG} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/app
ARG CURL=8.*
# a comment, and one within a continued line
RUN apt-get update \\
    # here
    && apt-get install --no-install-recommends -y "curl=${CURL}" git=1:2.* \\
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=cache,target=/var/cache/pip curl -f https://example.org | tar x || exit 1
RUN python -m pip install --no-cache-dir -r list.txt -c /c.txt "a[b]==1" "c @ git+https://x.org/c@abc" ./local
RUN <<SCRIPT
echo "sudo cd; pip install x | y"
SCRIPT
ENV PIP_CONSTRAINT=/c.txt
FROM build
COPY --from=build . .
CMD ["app", "--sudo"]
"""
BAD = {
    "DL3000": ["FROM a:1\nWORKDIR opt"],
    "DL3002": ["FROM a:1\nUSER user\nUSER root"],
    "DL3003": ["FROM a:1\nRUN cd /opt && make", "FROM a:1\nRUN <<E\ncd /opt\nE"],
    "DL3004": ["FROM a:1\nRUN sudo make", "FROM a:1\nRUN make; X=1 sudo make", "FROM a:1\nRUN bash -e <<E\nsudo x\nE"],
    "DL3006": ["FROM a", "FROM host:80/a", "ARG TAG\nFROM a:${TAG}", "FROM a:1 AS b\nFROM c"],
    "DL3007": ["FROM a:latest", "ARG TAG=latest\nFROM a:$TAG"],
    "DL3008": ["FROM a:1\nRUN apt-get install --no-install-recommends -y git"],
    "DL3009": ["FROM a:1\nRUN apt-get update"],
    "DL3013": [
        "FROM a:1\nRUN pip install --no-cache-dir x",
        "FROM a:1\nRUN python3 -m pip install --no-cache-dir x==1 'y>=2'",
        "FROM a:1\nRUN pip install --no-cache-dir git+https://x.org/c",
    ],
    "DL3015": ["FROM a:1\nRUN apt-get install -y git=1"],
    "DL3020": ["FROM a:1\nADD a /a"],
    "DL3025": ["FROM a:1\nCMD app --flag", "FROM a:1\nENTRYPOINT app"],
    "DL3042": ["FROM a:1\nRUN pip install x==1"],
    "DL4006": [
        "FROM a:1\nRUN a | b",
        'FROM a:1\nSHELL ["bash", "-o", "pipefail", "-c"]\nFROM b:1\nRUN a | b',
    ],
    "every-name-is-used": ["FROM a:1\nARG X=1\nRUN echo X", "FROM a:1\nRUN echo $X\nENV X=1", "FROM a:1\nENV XY=1 X=2\nRUN $XY"],
    "no-secrets": ["FROM a:1\nARG HF_TOKEN\nRUN a $HF_TOKEN", "FROM a:1\nENV DB_PASSWORD=x\nRUN a $DB_PASSWORD"],
}  # fmt: skip
CASES = [
    pytest.param(code, bad, id=f"{code}-{n}") for code, bads in BAD.items() for n, bad in enumerate(bads)
]


@pytest.mark.parametrize("code", RULES)
def test_our_dockerfile_keeps_the_rule(code: str) -> None:
    assert code not in lint(SOURCE), RULES[code][0]


@pytest.mark.parametrize(("code", "bad"), CASES)
def test_a_dockerfile_that_breaks_one_rule_breaks_that_one(code: str, bad: str) -> None:
    found = lint(bad)
    assert set(found) == {code}
    assert 1 <= found[code][0] <= bad.count("\n") + 1


def test_a_good_dockerfile_breaks_none_and_every_rule_has_a_bad_one() -> None:
    assert lint(GOOD) == {}
    assert set(BAD) == set(RULES)


def test_the_parser_refuses_a_here_document_without_an_end() -> None:
    with pytest.raises(ValueError, match="PY has no end"):
        parse("FROM a:1\nRUN python - <<'PY'\nprint(1)\n")


# ------------------------------------------------------------------------------------------ what is in the image


def default(name: str) -> str:
    return next(i.text.partition("=")[2] for i in OURS if i.name == "ARG" and i.text.startswith(f"{name}="))


def test_versions_are_arguments_with_defaults_that_name_one_version() -> None:
    assert re.fullmatch(r"\d\d\.\d\d-py3", default("PYTORCH_TAG"))
    assert all(
        re.fullmatch(r"\d+\.\d+\.\d+(\.post\d+)?", default(f"{n}_VERSION"))
        for n in ("MAMBA_SSM", "CAUSAL_CONV1D")
    )


def test_the_page_on_gpus_names_the_same_versions() -> None:
    page = (ROOT / "docs" / "install_gpu.md").read_text(encoding="utf-8")
    for name in ("PYTORCH_TAG", "MAMBA_SSM_VERSION", "CAUSAL_CONV1D_VERSION"):
        assert name in page and default(name) in page, name


def test_every_optional_kernel_is_installed_or_the_image_s_own(tmp_path: Path) -> None:
    commands = " ".join([*(i.text + "".join(i.heredocs) for i in OURS), *requirements(tmp_path)])
    for kernel in KERNELS:
        assert re.search(rf"\b{kernel.distribution}\b", commands), kernel.distribution


def test_jobs_can_run_any_command_in_it_and_without_one_it_says_what_it_found() -> None:
    """`docker run IMAGE bash -c ...` and the like: an entry point of ours would swallow it."""
    assert not [i for i in OURS if i.name == "ENTRYPOINT"]
    assert OURS[-1].name == "CMD" and OURS[-1].text == '["elastic-megatron", "--check"]'


# ------------------------------------------------------------------------------------------ the Python inside it


def heredoc(marker: str) -> Instruction:
    return next(i for i in OURS if i.heredocs and marker in i.text + i.heredocs[0])


def run(marker: str, *paths: Path, alone: bool = False) -> subprocess.CompletedProcess[str]:
    """The here-document by what it is known by, in the folder it expects, with ``paths`` before other packages.

    ``alone``: no other packages are there.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(["-S"] if alone else []), "-"]
    code = heredoc(marker).heredocs[0]
    return subprocess.run(
        command, input=code, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def requirements(folder: Path, **there: str) -> dict[str, str]:
    """What would be installed where these versions are there: name to version."""
    (folder / "packaging").symlink_to(Path(packaging.__file__).parent)
    for name, version in there.items():
        package(folder, name.replace("_", "-"), version)
    done = run("requirements.txt", folder, alone=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split("==") for line in done.stdout.split())


WANTED = [Requirement(line) for line in PROJECT["dependencies"]]


def test_requirements_are_those_of_pyproject_in_the_versions_of_the_lock_without_torch(
    tmp_path: Path,
) -> None:
    found = requirements(tmp_path)
    assert found == {wanted.name: LOCKED[wanted.name] for wanted in WANTED if wanted.name != "torch"}
    assert all(wanted.specifier.contains(found[wanted.name]) for wanted in WANTED if wanted.name != "torch")
    assert found["megatron-core"].startswith("0.19.")
    assert [str(w.specifier) for w in WANTED if w.name == "nvidia-modelopt"] == [
        f"=={found['nvidia-modelopt']}"
    ]


def test_what_the_image_has_and_pyproject_accepts_stays(tmp_path: Path) -> None:
    there = {
        "torch": "2.13.0a0+8145d630e8.nv26.6",
        "numpy": "2.1.0",
        "pyyaml": "6.0.1",
        "safetensors": "0.9.0a1",
    }
    old = {"pydantic": "2.10.6", "nvidia_modelopt": "0.45.0", "transformers": "5.17.0"}
    found = requirements(tmp_path, **there, **old)
    assert not set(there) & set(found)
    assert {name.replace("_", "-") for name in old} <= set(found)


def package(folder: Path, name: str, version: str, *modules: str) -> None:
    """Metadata of a distribution, and empty modules."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for module in modules:
        path = folder.joinpath(*module.split("."))
        path.mkdir(parents=True, exist_ok=True)
        for parent in [path, *path.parents]:
            if parent == folder:
                break
            (parent / "__init__.py").touch()


def test_constraints_hold_the_image_s_torch_transformer_engine_and_apex(tmp_path: Path) -> None:
    package(tmp_path, "torch", "2.13.0a0+8145d630e8.nv26.6.1")
    package(tmp_path, "apex", "0.1")
    package(tmp_path, "transformer-engine", "2.16.0+4220403e", "transformer_engine.pytorch")
    done = run("constraints.txt", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    held = {"torch==2.13.0a0+8145d630e8.nv26.6.1", "transformer-engine==2.16.0+4220403e", "apex==0.1"}
    assert held <= set(lines)
    assert all(re.fullmatch(r"[\w-]+==[\w.+]+", line) for line in lines)
    assert any(line.startswith("numpy==") for line in lines)


def test_the_build_stops_at_a_torch_older_than_ours(tmp_path: Path) -> None:
    package(tmp_path, "torch", "2.12.0a0+0291f960b6.nv26.4")
    package(tmp_path, "transformer-engine", "2.16.0", "transformer_engine.pytorch")
    done = run("constraints.txt", tmp_path)
    assert done.returncode == 1 and "torch 2.13.0 is needed, the image has 2.12.0a0" in done.stderr


def test_the_build_stops_at_an_image_without_transformer_engine(tmp_path: Path) -> None:
    package(tmp_path, "transformer-engine", "2.16.0", "transformer_engine")
    done = run("constraints.txt", tmp_path)
    assert done.returncode == 1 and "transformer_engine.pytorch" in done.stderr


def test_the_build_stops_at_an_image_without_apex(tmp_path: Path) -> None:
    package(tmp_path, "torch", "2.13.0")
    package(tmp_path, "transformer-engine", "2.16.0", "transformer_engine.pytorch")
    done = run("constraints.txt", tmp_path)
    assert done.returncode == 1 and "the image has no Apex" in done.stderr


@pytest.mark.parametrize("left_out", ["", "mamba-ssm", "apex"])
def test_the_build_stops_if_a_kernel_does_not_import(tmp_path: Path, left_out: str) -> None:
    for distribution in {kernel.distribution for kernel in KERNELS} - {left_out}:
        modules = [m for kernel in KERNELS if kernel.distribution == distribution for m in kernel.modules]
        package(tmp_path, distribution, "1.0", *modules)
    done = run("KERNELS", tmp_path)
    assert done.returncode == bool(left_out), done.stderr
    assert left_out in done.stderr.lower()


# ------------------------------------------------------------------------------------------ the build context


def ignored(path: str) -> bool:
    """Docker's rule: the last pattern that matches the path or a folder above it decides."""
    verdict = False
    parts = path.split("/")
    prefixes = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    for line in IGNORE:
        pattern = line.strip().removeprefix("!")
        if pattern and not pattern.startswith("#") and any(matches(pattern, prefix) for prefix in prefixes):
            verdict = not line.startswith("!")
    return verdict


def matches(pattern: str, path: str) -> bool:
    tokens = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    translated = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", pattern)
    return re.fullmatch("".join(tokens.get(t, t if t.startswith("[") else re.escape(t)) for t in translated), path) is not None  # fmt: skip


def tracked(*folders: str) -> list[str]:
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    return [p.relative_to(ROOT).as_posix() for p in files if "__pycache__" not in p.parts]


def test_what_the_build_copies_is_in_its_context() -> None:
    copied = {source for i in OURS if i.name == "COPY" for source in i.text.split()[:-1]}
    assert copied == {".", "pyproject.toml", "uv.lock"}
    files = ["pyproject.toml", "uv.lock", PROJECT["readme"], *PROJECT["license-files"], "setup.py"]
    files += tracked("elastic_megatron", "recipes", "examples")
    assert len(files) > 100 and all((ROOT / file).is_file() for file in files)
    assert [file for file in files if ignored(file)] == []


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".venv/bin/python", ".env", ".netrc", "recipes/.env", "elastic_megatron/.env.local",
        "elastic_megatron/__pycache__/cli.cpython-312.pyc", "runs/a/checkpoint/iter_1/model.distcp", "quickstart/x",
        "nemotron/model-00001-of-00013.safetensors", "data.bin", "train.idx", "wandb/run/x", "build/lib/x.py",
        "elastic_megatron.egg-info/PKG-INFO", "tests/conftest.py", "docs/LOG.md", "id_rsa", "recipes/clusters/login.key",
        "core.1234", "slurm-12.out", "recipes/slurm-12.out", "examples/train.log", "image.sqsh", ".hypothesis/x",
    ],
)  # fmt: skip
def test_what_is_large_or_secret_is_not_in_its_context(path: str) -> None:
    assert ignored(path)
