#!/usr/bin/env bash
# mamba-ssm's Python code with its Triton kernels, from the source package and without its CUDA build, where tests/mamba
# looks for it. Not into .venv: there Megatron would find it and fail to load its compiled modules. Needs .venv, whose
# torch the package's set-up imports. Without it tests/mamba skips and says so.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=.tools/mamba_ssm
[ -f "$target/requirements.txt" ] && cmp -s "$target/requirements.txt" tests/mamba/requirements.txt && exit 0
rm -rf "$target"
export MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE
python3 -m pip --python .venv/bin/python install -q --no-deps --no-build-isolation --no-binary mamba-ssm \
  --require-hashes --target "$target" -r tests/mamba/requirements.txt
cp tests/mamba/requirements.txt "$target"
