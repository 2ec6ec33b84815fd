#!/usr/bin/env bash
# Engines that read exported directories, each in an environment of its own below .tools/engines, since their pins differ
# from ours: tests/engines/install.sh mlx. Without it the engine's tests skip and say so. Needs .venv (make setup).
set -euo pipefail
cd "$(dirname "$0")/../.."
engine=${1:?which engine: mlx}
case $engine in
  mlx) pins="mlx-lm==0.32.2 mlx==0.32.4 mlx-cpu==0.32.4" ;;
  *) echo "error: no engine $engine; there is: mlx" >&2; exit 2 ;;
esac
target=.tools/engines/$engine
[ "$(cat "$target/pins" 2>/dev/null)" = "$pins" ] && exit 0
rm -rf "$target"
.venv/bin/python -m venv "$target"
# shellcheck disable=SC2086 -- one word each
"$target/bin/python" -m pip install -q --no-cache-dir --disable-pip-version-check $pins
echo "$pins" > "$target/pins"
