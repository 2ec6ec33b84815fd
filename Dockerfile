# syntax=docker/dockerfile:1
# elastic_megatron on a GPU: NVIDIA's PyTorch image, the kernels that are compiled against it, and this package.
#
#     docker build -t elastic-megatron .
#
# NEVER BUILT: there was no container engine. tests/docs/test_dockerfile.py parses and lints this file and runs its
# Python as far as that goes without the image. docs/install_gpu.md names the sources.
#
# 26.06-py3 is what Megatron-Core 0.19.0 tests itself on, with this causal-conv1d and a mamba-ssm of six commits later.
# Others report in it Python 3.12.3, torch 2.13.0a0, CUDA 13.3, Transformer Engine 2.16.0 and numpy 2.1.0. Not known:
# whether all of it together trains. The first RUN stops where Python, torch, Transformer Engine or Apex do not fit.
ARG PYTORCH_TAG=26.06-py3
FROM nvcr.io/nvidia/pytorch:${PYTORCH_TAG}

ARG PYTORCH_TAG
LABEL org.opencontainers.image.title="elastic-megatron" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="nvcr.io/nvidia/pytorch:${PYTORCH_TAG}"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/elastic_megatron
COPY pyproject.toml uv.lock ./

# The image pins every package through PIP_CONSTRAINT. What is compiled against torch must stay as it is; the other
# pins would refuse newer pure Python packages. Hence constraints of our own, for this build and for every later pip.
RUN python - <<'PY' > /opt/constraints.txt
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version

import transformer_engine.pytorch  # the image's own: where this fails, the image is a wrong one

HELD = ("torch", "torchvision", "triton", "pytorch-triton", "transformer-engine", "apex", "flash-attn", "numpy")
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
ours = next(line.partition("==")[2] for line in project["dependencies"] if line.startswith("torch=="))


def release(text):
    return tuple(map(int, text.split(".")[:2]))


assert sys.version_info[:2] == (3, 12), f"megatron-core needs Python 3.12, the image has {sys.version}"
assert release(version("torch")) >= release(ours), f"torch {ours} is needed, the image has {version('torch')}"
for name in HELD:
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        # NVIDIA compiles Apex into the image; it is not on the package index, so nothing below could bring it.
        assert name != "apex", "the image has no Apex: take an NVIDIA PyTorch tag that has it"
        print(f"the image has no {name}", file=sys.stderr)
PY
ENV PIP_CONSTRAINT=/opt/constraints.txt

# The dependencies of pyproject.toml: what the image has and pyproject.toml accepts stays, the rest comes
# in the versions of uv.lock.
RUN python - <<'PY' > /opt/requirements.txt
import tomllib
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
locked = {p["name"]: p["version"] for p in tomllib.load(open("uv.lock", "rb"))["package"]}


def accepted(wanted):
    try:
        return wanted.name == "torch" or wanted.specifier.contains(version(wanted.name), prereleases=True)
    except PackageNotFoundError:
        return False


for wanted in map(Requirement, project["dependencies"]):
    if not accepted(wanted):
        print(f"{wanted.name}=={locked[wanted.name]}")
PY
RUN pip install --no-cache-dir -r /opt/requirements.txt

# Compiled against the image's torch (no build isolation, FORCE_BUILD) instead of fetched as wheels for another one.
# --no-deps: what else mamba-ssm requires (tilelang, quack-kernels, apache-tvm-ffi) serves Mamba-3, which is not used.
ARG JOBS=8
ARG CAUSAL_CONV1D_VERSION=1.6.2.post1
ARG MAMBA_SSM_VERSION=2.3.2.post1
RUN CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE MAX_JOBS=${JOBS} \
    pip install --no-cache-dir --no-build-isolation --no-deps \
        "causal-conv1d==${CAUSAL_CONV1D_VERSION}" "mamba-ssm==${MAMBA_SSM_VERSION}"

# --no-deps: pyproject.toml pins torch's public release, and the image's build of it must stay. The files are made
# readable for everybody: under pyxis and apptainer it is not root who runs.
COPY . .
RUN pip install --no-cache-dir --no-deps . && rm -rf build ./*.egg-info && chmod -R a+rX .

# No ENTRYPOINT: the image's own prints a banner and runs the command, such as the `bash -c` of a job.
WORKDIR /workspace
RUN python - <<'PY'
from elastic_megatron.runtime.kernels import KERNELS, look

found = {kernel.name: look(kernel) for kernel in KERNELS}
broken = {name: finding for name, finding in found.items() if finding.state != "found"}
assert not broken, broken
PY
CMD ["elastic-megatron", "--check"]
