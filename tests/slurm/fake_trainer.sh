#!/bin/bash
# Stands in for elastic-megatron in a job: fake_trainer.sh COMMAND RECIPE, as a rank. What the N-th attempt of job
# NAME does is the N-th word of the file plan.NAME beside this one; the last word holds for all attempts after it.
#   finish        leave with status 0
#   exit-N        leave with status N
#   advance-N     rank 0 writes a newer checkpoint, then leave with status N
#   wait          for SIGUSR1 (newer checkpoint, status 75) or SIGTERM (newer checkpoint, status 143)
# It writes beside the recipe: `ranks`, a line a rank and attempt; `signals`; `waiting.ATTEMPT.RANK` once it can be
# signalled. The "checkpoint" is a tracker file without checkpoints, which is all that a job script looks at.
job=$(dirname "$2")
run_dir=$(sed -n 's/^run_dir: //p' "$2")
tracker=$run_dir/checkpoints/latest_checkpointed_iteration.txt
attempt=$(grep -c ' start ' "$job/attempts")
read -r -a plan <"$(dirname "$0")/plan.$(basename "$job")"
index=$((attempt <= ${#plan[@]} ? attempt - 1 : ${#plan[@]} - 1))
step=$(cat "$tracker" 2>/dev/null || echo 0)

advance() {
    if [[ $RANK = 0 ]]; then
        mkdir -p "$run_dir/checkpoints"
        echo $((step + 10)) >"$tracker"
    fi
}

leave() {
    trap '' USR1 TERM # torchrun may pass a signal on that has come already
    echo "$attempt $RANK $1" >>"$job/signals"
    echo "rank $RANK saves on $1"
    advance
    exit "$2"
}

echo "$attempt rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, $MASTER_ADDR:$MASTER_PORT, $1 from $step" >>"$job/ranks"
echo "rank $RANK starts at step $step"
# as real ranks meet before they train: the first to fail takes the others along, whatever they had still to write
meet() { for _ in {1..600}; do "$@" && return; sleep 0.1; done; exit 9; }
all_started() { [[ $(grep -c "^$attempt rank " "$job/ranks") -ge $WORLD_SIZE ]]; }
newer() { [[ $(cat "$tracker" 2>/dev/null) -gt $step ]]; }
meet all_started

case ${plan[index]} in
    finish) exit 0 ;;
    exit-*) exit "${plan[index]#exit-}" ;;
    advance-*) advance && meet newer && exit "${plan[index]#advance-}" ;;
    wait)
        trap 'leave USR1 75' USR1
        trap 'leave TERM 143' TERM
        echo $$ >"$job/waiting.$attempt.$RANK"
        # a trap runs at once only while the shell waits; an end, should the test die
        for _ in {1..3000}; do sleep 0.1 & wait $!; done
        ;;
esac
