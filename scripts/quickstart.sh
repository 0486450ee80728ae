#!/usr/bin/env bash
# Both stages of a small LLaVA-NeXT: installs, fetches, prepares, trains on two ranks, and reads small letters in held-out
# images, with AnyRes tiles and with the base view alone. Runs on the CPU, also on machines with a GPU. Everything is
# written to outputs/quickstart; a second start does only what is missing.
#
#   ./scripts/quickstart.sh [--hub]
#
# --hub: a small CLIP tower from the model hub instead of DINOv2, so that vLLM can serve the model; everything is written
#        to outputs/quickstart_hub
# HF_ENDPOINT        address of a mirror of the hub, for --hub
# LLAVA_NEXT_CACHE   folder of the fetched assets (default: llava_next in $XDG_CACHE_HOME or ~/.cache)
# For scripts/setup.sh: PYTHON, LLAVA_NEXT_PYTHON, TORCH_BUILD, TORCH_CPU_INDEX
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in
    "") hub= ;;
    --hub) hub=1 ;;
    -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) printf 'quickstart: takes only --hub (got "%s"); for your own runs use python -m train\n' "$1" >&2; exit 2 ;;
esac

# The run's name, the side of a patch of its tower in pixels, and arguments of training and of the summary.
NAME=quickstart PATCH=14 TOWER=() SUMMARY=()
if [[ -n $hub ]]; then # TinyCLIP ViT-8M/16 with 4 x 4 patches per tile, as DINOv2 has here, and CLIP's normalization
    NAME=quickstart_hub PATCH=16 SUMMARY=(--served)
    # shellcheck disable=SC2016 # OmegaConf expands it
    TOWER=(model/vision_tower=clip_vit_l_336 model.vision_tower.name=tinyclip_8m
        'model.vision_tower.path=${llava_next.cache_root:}/tinyclip_8m' model.vision_tower.tile=64)
fi
OUT=outputs/$NAME
RAW=$OUT/raw
STORES=$OUT/stores
DONE=$OUT/steps.tsv # one line per finished step: title, seconds, command; summary.py reads the seconds
NUM_STEPS=$((12 + ${hub:-0}))

source scripts/cache_root.sh
# No hub (but for --hub's tower), no account, and the CPU also on machines with a GPU, so that results are the same
# everywhere.
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
    torchrun --standalone --nproc-per-node 2 -m train experiment=quickstart "stage=$1" "name=$NAME" \
        "data.store_root=$STORES" "${TOWER[@]}"
}

# -------------------------------------------------------------------------------------------------------- program

step "Python environment" ./scripts/setup.sh --extras quickstart
PATH=$(dirname "${LLAVA_NEXT_PYTHON:-$PWD/.venv/bin/python}"):$PATH
export PATH
step "DeepSpeed's CPU op, compiled once" start_ops
step "Tower, tokenizer, images and texts" python scripts/quickstart/assets.py --set quickstart
[[ -z $hub ]] || step "A CLIP tower from the model hub" env HF_HUB_OFFLINE=0 python scripts/quickstart/hub_tower.py
step "Raw data in the layouts of the real sources" \
    python scripts/quickstart/draw.py --raw "$RAW" --scale 0.3 --patch "$PATCH"
step "Stores for stage 1" prepare quickstart_align
step "Stores for stage 2" prepare quickstart_finetune
step "Waiting for DeepSpeed's op" await_ops
step_once "$OUT/align/connector" "Stage 1: the connector is trained" train_stage align
step_once "$OUT/finetune/export" "Stage 2: every part is trained" train_stage finetune
step_once "$OUT/finetune/evaluation.json" "Questions about held-out images" \
    torchrun --standalone --nproc-per-node 2 -m train.evaluate "$OUT/finetune" --base-view --limit 320 \
    --num-samples 320 --num-samples easy_vqa_test=20 --generate 6 --max-new-tokens 24
step "Report" python -m train.report "$OUT/align" "$OUT/finetune" --out "$OUT/report.html" --samples 18
step "Summary" python scripts/quickstart/summary.py --out "$OUT" "${SUMMARY[@]}"

printf '\nquickstart: done in %s. Open %s/report.html in a browser.\n' "$(clock)" "$OUT"
