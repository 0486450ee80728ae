#!/usr/bin/env bash
# Both stages of LLaVA-NeXT, small but real, from nothing: installs, fetches, prepares, trains on two ranks, and
# answers questions about pictures that it never saw. On CPU, also where there is a GPU. Everything lands in
# outputs/quickstart; a second start does only what is missing.
#
#   ./scripts/quickstart.sh
#
# LLAVA_NEXT_CACHE   where fetched assets are kept (default: ~/.cache/llava_next)
# For scripts/setup.sh: PYTHON, LLAVA_NEXT_PYTHON, TORCH_BUILD, TORCH_CPU_INDEX
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in
    "") ;;
    -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) printf 'quickstart: takes no arguments (got "%s"); runs of your own: python -m train ...\n' "$1" >&2; exit 2 ;;
esac

OUT=outputs/quickstart
RAW=$OUT/raw
STORES=$OUT/stores
DONE=$OUT/steps.tsv # one line a finished step: id, seconds, command; summary.py reads the seconds
NUM_STEPS=11

export LLAVA_NEXT_CACHE=${LLAVA_NEXT_CACHE:-$HOME/.cache/llava_next}
# No hub, no account, and the CPU also where there is a GPU: what is shown is the same on every machine.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE=${WANDB_MODE:-offline} TOKENIZERS_PARALLELISM=false
export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
half=$(($(nproc) / 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((half < 1 ? 1 : half > 8 ? 8 : half))} # two ranks share the cores

# ------------------------------------------------------------------------------------------------------- steps

number=0
current="starting"
background=() # process groups to end with us

say() { printf '%s\n' "$*"; }
clock() { printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60)); }

announce() { # TITLE
    number=$((number + 1))
    current=$1
    printf '\n[%s] %d/%d %s\n' "$(clock)" "$number" "$NUM_STEPS" "$1"
}

# step TITLE COMMAND...: for commands that find out themselves, quickly, what is missing.
step() {
    local started=$SECONDS
    announce "$1"
    shift
    "$@"
    record "$current" $((SECONDS - started)) "$*"
}

# step_once PRODUCT TITLE COMMAND...: left out when the same command has finished and PRODUCT is still there.
step_once() {
    local product=$1 started=$SECONDS
    shift
    announce "$1"
    shift
    if [[ -e $product ]] && finished "$current" "$*"; then
        say "      is done: $product (to do it again, remove it)"
        return
    fi
    "$@"
    [[ -e $product ]] || { say "      ended without $product" >&2; return 1; }
    record "$current" $((SECONDS - started)) "$*"
}

record() { # ID SECONDS COMMAND; a step that ran again replaces its line, unless it found nothing to do
    mkdir -p "$OUT"
    local line id seconds command kept=
    while IFS=$'\t' read -r id seconds command; do
        [[ $id == "$1" ]] || { kept+="$id"$'\t'"$seconds"$'\t'"$command"$'\n'; continue; }
        [[ $command == "$3" && $seconds -gt $2 ]] && return
    done < <(cat "$DONE" 2>/dev/null || true)
    line="$1"$'\t'"$2"$'\t'"$3"
    printf '%s%s\n' "$kept" "$line" >"$DONE.partial"
    mv "$DONE.partial" "$DONE"
}

finished() { # ID COMMAND
    local id seconds command
    while IFS=$'\t' read -r id seconds command; do
        [[ $id == "$1" && $command == "$2" ]] && return
    done < <(cat "$DONE" 2>/dev/null || true)
    return 1
}

# Ends what runs in the background, and says how to go on. Also on Ctrl-C and on SIGTERM.
leave() {
    local code=$? group
    trap '' INT TERM
    for group in "${background[@]}"; do kill -TERM -- "-$group" 2>/dev/null || true; done
    if ((code != 0)); then
        printf '\nquickstart: stopped in "%s" after %s (exit code %d). What is done is kept:\n' \
            "$current" "$(clock)" "$code" >&2
        printf 'run ./scripts/quickstart.sh again, and it goes on from there.\n' >&2
    fi
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# DeepSpeed compiles its shared-memory collective at the first start, over a minute on two cores. Here that happens
# once, in one process, while assets are fetched and drawn. A process group of its own, so that it ends whole.
start_ops() {
    mkdir -p "$OUT"
    setsid python -m train.engine.deepspeed_ops >"$OUT/ops.log" 2>&1 &
    ops=$!
    background+=("$ops")
    say "      goes on in the background (log: $OUT/ops.log)"
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

# ---------------------------------------------------------------------------------------------------- what is done

step "Python environment" ./scripts/setup.sh --extras quickstart
PATH=$(dirname "${LLAVA_NEXT_PYTHON:-$PWD/.venv/bin/python}"):$PATH
export PATH
step "DeepSpeed's CPU op, compiled once" start_ops
step "Real tower, tokenizer, pictures and texts" python scripts/quickstart/assets.py --set quickstart
step "Raw data in the layouts of the real sources" python scripts/quickstart/draw.py --raw "$RAW"
step "Stores for stage 1" prepare quickstart_align
step "Stores for stage 2" prepare quickstart_finetune
step "Waiting for DeepSpeed's op" await_ops
step_once "$OUT/align/connector" "Stage 1: the connector learns" train_stage align
step_once "$OUT/finetune/export" "Stage 2: every part learns" train_stage finetune
step_once "$OUT/evaluation.json" "Questions about pictures that it never saw" \
    env OMP_NUM_THREADS="$(nproc)" python -m train.evaluate "$OUT/finetune" --limit 400 --num 200 --generate 2 --out "$OUT/evaluation.json"
step "Summary" python scripts/quickstart/summary.py --out "$OUT"

printf '\nquickstart: done in %s. Everything lies in %s; start with %s/summary.json.\n' "$(clock)" "$OUT" "$OUT"
