#!/usr/bin/env bash
# Transformer Engine's Python code, a wheel of 1.2 MB without its compiled kernels, unpacked where tests/te looks for it.
# Not into .venv: there Megatron would find it and fail to load the kernels. Without it tests/te skips and says so.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=2.20.2 target=.tools/transformer_engine
[ -d "$target/transformer_engine-$version.dist-info" ] && exit 0
rm -rf "$target"
exec python3 -m pip install -q --no-deps --target "$target" "transformer-engine==$version"
