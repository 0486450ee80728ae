#!/usr/bin/env bash
# Both stages of a small LLaVA-NeXT: installs, fetches, prepares, trains on two ranks, and answers questions about
# held-out images. Runs on the CPU, also on machines with a GPU. Everything is written to outputs/quickstart; a second
# start does only what is missing.
#
#   ./scripts/quickstart.sh
#
# LLAVA_NEXT_CACHE   folder of the fetched assets (default: llava_next in $XDG_CACHE_HOME or ~/.cache)
# For scripts/setup.sh: PYTHON, LLAVA_NEXT_PYTHON, TORCH_BUILD, TORCH_CPU_INDEX
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in
    "") ;;
    -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) printf 'quickstart: takes no arguments (got "%s"); for your own runs use python -m train\n' "$1" >&2; exit 2 ;;
esac

OUT=outputs/quickstart
RAW=$OUT/raw
STORES=$OUT/stores
DONE=$OUT/steps.tsv # one line per finished step: title, seconds, command; summary.py reads the seconds
NUM_STEPS=11

source scripts/cache_root.sh
# No hub, no account, and the CPU also on machines with a GPU, so that results are the same everywhere.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE=${WANDB_MODE:-offline} TOKENIZERS_PARALLELISM=false
export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
half=$(($(nproc) / 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((half < 1 ? 1 : half > 8 ? 8 : half))} # two ranks share the cores

# ------------------------------------------------------------------------------------------------------- steps

number=0
current="starting"
background=() # process groups that end with this script

say() { printf '%s\n' "$*"; }
clock() { printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60)); }

announce() { # TITLE
    number=$((number + 1))
    current=$1
    printf '\n[%s] %d/%d %s\n' "$(clock)" "$number" "$NUM_STEPS" "$1"
}

# step TITLE COMMAND...: for commands that themselves do only what is missing.
step() {
    local started=$SECONDS
    announce "$1"
    shift
    "$@"
    record "$current" $((SECONDS - started)) "$*"
}

# step_once PRODUCT TITLE COMMAND...: skipped if the same command has finished and PRODUCT exists.
step_once() {
    local product=$1 started=$SECONDS
    shift
    announce "$1"
    shift
    if [[ -e $product ]] && finished "$current" "$*"; then
        say "      done before: $product (remove it to do it again)"
        return
    fi
    "$@"
    [[ -e $product ]] || { say "      ended without writing $product" >&2; return 1; }
    record "$current" $((SECONDS - started)) "$*"
}

record() { # ID SECONDS COMMAND; replaces the line of an earlier run, unless this one was shorter (nothing to do)
    mkdir -p "$OUT"
    local line id seconds command others=
    while IFS=$'\t' read -r id seconds command; do
        [[ $id == "$1" ]] || { others+="$id"$'\t'"$seconds"$'\t'"$command"$'\n'; continue; }
        [[ $command == "$3" && $seconds -gt $2 ]] && return
    done < <(cat "$DONE" 2>/dev/null || true)
    line="$1"$'\t'"$2"$'\t'"$3"
    printf '%s%s\n' "$others" "$line" >"$DONE.partial"
    mv "$DONE.partial" "$DONE"
}

finished() { # ID COMMAND
    local id seconds command
    while IFS=$'\t' read -r id seconds command; do
        [[ $id == "$1" && $command == "$2" ]] && return
    done < <(cat "$DONE" 2>/dev/null || true)
    return 1
}

# Ends background processes and prints how to continue. Also on Ctrl-C and on SIGTERM.
leave() {
    local code=$? group
    trap '' INT TERM
    for group in "${background[@]}"; do kill -TERM -- "-$group" 2>/dev/null || true; done
    if ((code != 0)); then
        printf '\nquickstart: stopped in "%s" after %s (exit code %d). Finished steps are kept;\n' \
            "$current" "$(clock)" "$code" >&2
        printf 'run ./scripts/quickstart.sh again to continue.\n' >&2
    fi
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# DeepSpeed compiles its shared-memory collective at the first start, for over a minute on two cores. Here it is compiled
# in one process while assets are fetched and drawn, in a process group of its own that can be ended as a whole.
start_ops() {
    mkdir -p "$OUT"
    setsid python -m train.engine.deepspeed_ops >"$OUT/ops.log" 2>&1 &
    ops=$!
    background+=("$ops")
    say "      continues in the background (log: $OUT/ops.log)"
}

await_ops() {
    local code=0
    wait "$ops" || code=$?
    background=()
    ((code == 0)) || { tail -n 30 "$OUT/ops.log" >&2; return "$code"; }
}

prepare() { # MIXTURE
    python -m data_recipes.prepare --mixture "$1" --raw "$RAW" --stores "$STORES"
}

train_stage() { # STAGE
    torchrun --standalone --nproc-per-node 2 -m train experiment=quickstart "stage=$1"
}

# -------------------------------------------------------------------------------------------------------- program

step "Python environment" ./scripts/setup.sh --extras quickstart
PATH=$(dirname "${LLAVA_NEXT_PYTHON:-$PWD/.venv/bin/python}"):$PATH
export PATH
step "DeepSpeed's CPU op, compiled once" start_ops
step "Tower, tokenizer, images and texts" python scripts/quickstart/assets.py --set quickstart
step "Raw data in the layouts of the real sources" python scripts/quickstart/draw.py --raw "$RAW"
step "Stores for stage 1" prepare quickstart_align
step "Stores for stage 2" prepare quickstart_finetune
step "Waiting for DeepSpeed's op" await_ops
step_once "$OUT/align/connector" "Stage 1: the connector is trained" train_stage align
step_once "$OUT/finetune/export" "Stage 2: every part is trained" train_stage finetune
step_once "$OUT/evaluation.json" "Questions about held-out images" \
    env OMP_NUM_THREADS="$(nproc)" python -m train.evaluate "$OUT/finetune" --limit 400 --num 200 --generate 2 --out "$OUT/evaluation.json"
step "Summary" python scripts/quickstart/summary.py --out "$OUT"

printf '\nquickstart: done in %s. Everything is in %s; start with %s/summary.json.\n' "$(clock)" "$OUT" "$OUT"
