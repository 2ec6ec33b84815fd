# syntax=docker/dockerfile:1
# elastic_megatron on a GPU: the package and Mamba's kernels on top of NVIDIA's PyTorch image.
#
#     docker build --build-arg PYTORCH_TAG=<tag> -t elastic-megatron .
#
# NOT BUILT YET: no step of this file was run, for want of a container engine. What was checked without one is
# the Python of the second RUN (it prints every run-time dependency but torch). Take a tag whose image has Python
# 3.12 and a torch near the 2.13 of pyproject.toml; the first RUN stops the build where it does not.
ARG PYTORCH_TAG
FROM nvcr.io/nvidia/pytorch:${PYTORCH_TAG}

# The image constrains every pip call through PIP_CONSTRAINT. Its pins of torch and of what is compiled against
# torch must hold; its other pins would refuse newer pure Python packages. So: our own constraints instead.
ENV PIP_CONSTRAINT=
RUN python - <<'PY'
import sys
from importlib.metadata import version
from pathlib import Path

assert sys.version_info[:2] == (3, 12), f"megatron-core needs Python 3.12, the image has {sys.version}"
import torch
import transformer_engine.pytorch  # the image's own: an import error here means a wrong image

held = ("torch", "transformer-engine", "numpy")
Path("/opt/constraints.txt").write_text("".join(f"{name}=={version(name)}\n" for name in held))
print(torch.__version__, torch.version.cuda)
PY

WORKDIR /opt/elastic_megatron
COPY pyproject.toml ./
RUN python - <<'PY' > /opt/requirements.txt && pip install --no-cache-dir -c /opt/constraints.txt -r /opt/requirements.txt
import re
import tomllib

for line in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    if re.match(r"[\w-]+", line)[0] != "torch":
        print(line)
PY

# Compiled against the image's torch (no build isolation) instead of fetched as a wheel for another one.
ARG MAX_JOBS=8
RUN CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE MAX_JOBS=${MAX_JOBS} \
    pip install --no-cache-dir --no-build-isolation -c /opt/constraints.txt "causal-conv1d~=1.5" mamba-ssm

# --no-deps: pyproject.toml pins torch's public release, and the image's build of it must stay.
COPY . .
RUN pip install --no-cache-dir --no-deps . \
    && python -c "import causal_conv1d, mamba_ssm, torch, transformer_engine.pytorch, elastic_megatron" \
    && elastic-megatron plan recipes/nemotron3_nano_30b/plan.yaml

WORKDIR /workspace
