#!/usr/bin/env bash
# Eight GPUs of one node, after tools/gpu_check.py: layouts over NCCL, Nano's layouts on six of its layers, long
# distillation on NVFP4, overlap, memory beside `plan`, a requeued job and a killed rank.
#
#   tools/gpu_check_8.sh FOLDER              # up to 150 GB at a time; logs and results.jsonl stay there
#   tools/gpu_check_8.sh FOLDER --rehearse   # two ranks of gloo on a CPU, tiny: proves nothing about a GPU
#
# Each step has a time limit, prints pass or fail (`rehearsed` in place of pass) with its numbers, and the next one
# runs whatever became of it. Exit status 1 where one has failed.
set -uo pipefail

folder=${1:?usage: tools/gpu_check_8.sh FOLDER [--rehearse]}
rehearse=${2:-}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
ranks=8 good=pass layouts=tests/parallel/test_gpu.py chosen=""
if [[ -n $rehearse ]]; then
  [[ $rehearse == --rehearse ]] || { echo "error: $rehearse: the only option is --rehearse" >&2; exit 2; }
  ranks=2 good=rehearsed layouts=tests/parallel/test_training.py chosen="EP2 and not allgather"
  export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
elif ! nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; then
  echo "error: nvidia-smi finds no GPU here; --rehearse runs the same steps on a CPU" >&2
  exit 2
fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
: >"$folder/results.jsonl"
failed=0

# step NAME SECONDS COMMAND...: the last line of what it prints is its number
step() {
  local name=$1 limit=$2 began=$SECONDS outcome=$good status=0 last
  shift 2
  export limit
  "$@" >"$folder/$name.log" 2>"$folder/$name.err" || status=$?
  last=$(grep -v '^[[:space:]]*$' "$folder/$name.log" | tail -1)
  if ((status)); then
    outcome=fail failed=1
    last="$last $(grep -hE '(Error|error): ' "$folder/$name.err" | tail -1)"
  fi
  echo "$outcome  $name: ${last:0:300}  [$((SECONDS - began)) s, status $status]"
  printf '{"step": "%s", "outcome": "%s", "status": %d, "seconds": %d}\n' \
    "$name" "$outcome" "$status" $((SECONDS - began)) >>"$folder/results.jsonl"
}

bounded() { timeout -k 20 "$limit" "$@"; }

train() {
  bounded "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
    "$here/gpu/eight.py" train "$folder" "$1"
}

# alone RUN: train, and keep no checkpoint
alone() {
  train "$1" && rm -rf "${folder:?}/$1/checkpoints"
}

# the run's newest complete checkpoint has at least this many steps
saved() {
  local tracker="$folder/$1/checkpoints/latest_checkpointed_iteration.txt"
  [[ -f $tracker ]] && (($(<"$tracker") >= $2))
}

# again RUN SIGNAL: a rank gets the signal once something is saved; all ranks end, and the same command completes
again() {
  local name=$1 signal=$2 pid
  train "$name" &
  pid=$!
  until saved "$name" 10 || ! kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
  kill "-$signal" "$(<"$folder/$name.1.pid")" || echo "it was done before the signal"
  if wait "$pid"; then
    echo "the ranks ended with status 0 after $signal"
    return 1
  fi
  if saved "$name" 40; then
    echo "nothing was left to do when $signal came"
    return 1
  fi
  train "$name" && saved "$name" 40 && rm -rf "${folder:?}/$name/checkpoints"
}

# faster RUN OTHER: median milliseconds of a step with and without overlap
faster() {
  "$python" - "$folder/$1.log" "$folder/$2.log" <<'PYTHON'
import json, sys
a, b = (next(json.loads(x) for x in reversed(open(f).read().splitlines()) if x.startswith('{"run"')) for f in sys.argv[1:])
print(f"step with overlap {a['step_ms']:.1f} ms, without {b['step_ms']:.1f} ms: {a['step_ms'] / b['step_ms']:.3f}")
PYTHON
}

# planned RUN...: memory of the fullest rank beside plan's; fails where plan said less
planned() {
  "$python" - "${@/#/$folder/}" <<'PYTHON'
import json, sys
low = []
for path in sys.argv[1:]:
    runs = [json.loads(x) for x in open(path + ".log").read().splitlines() if x.startswith('{"run"')]
    for r in runs:
        print(f"{r['run']}: measured {r['peak_gib']} GiB, plan {r['plan_gib']:.2f} GiB")
        low += [r["run"]] if r["peak_gib"] and r["peak_gib"] > r["plan_gib"] else []
print("plan said less than was measured: " + (", ".join(low) or "nowhere"))
sys.exit(bool(low))
PYTHON
}

layouts() {
  cd "$here/.." && bounded "$python" -m pytest -q -x "$layouts" ${chosen:+-k "$chosen"}
}

step prepare 300 bounded "$python" "$here/gpu/eight.py" prepare "$folder" ${rehearse:+--rehearse}
step layouts 1500 layouts
step stage1 300 alone stage1
step stage1_no_overlap 300 alone stage1_no_overlap
step overlap 30 faster stage1 stage1_no_overlap
step stage2 420 alone stage2
step qad 600 alone qad
step memory 30 planned stage1 stage2 qad
step requeue 420 again requeue USR1
step killed 420 again killed KILL
exit $failed
