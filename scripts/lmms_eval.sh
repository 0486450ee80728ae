#!/usr/bin/env bash
# Runs lmms-eval on a model that train wrote, or on any LLaVA-NeXT in the Hugging Face layout.
#
#   ./scripts/lmms_eval.sh EXPORT --tasks mme,pope,... [ARGUMENT...]     the benchmarks of these names; data from the hub
#   ./scripts/lmms_eval.sh EXPORT --store STORE [ARGUMENT...]            a prepared source: no hub, no account
#
# ARGUMENT... are passed on to lmms-eval (--limit 8, --output_path DIR). It is installed in an environment of its own at
# the first start (about 2.5 GB), because it needs other versions than training. `--store` asks the first question of
# every sample with images and compares answers by exact match: scripts/lmms_eval/tasks.
#
# LLAVA_NEXT_CACHE   folder of the environment (default: llava_next in $XDG_CACHE_HOME or ~/.cache)
# LMMS_EVAL_PYTHON   Python 3.11 or 3.12 for the environment (default: the first of python3.11 python3.12 python3)
# TORCH_CPU_INDEX    index of CPU wheels of torch, used without a GPU where pip would install a CUDA build
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD

# filelock 4 lacks a module that lmms-eval imports; its llava_hf imports decord, and MathVista's task Levenshtein, which are
# not among its requirements.
PINS=(lmms-eval==0.7.3 transformers==5.23.0 torchvision==0.28.0 decord==0.6.0 filelock==3.32.7 Levenshtein==0.27.5)
TORCH=torch==2.13.0
STAMP=$(printf '%s\n' "${PINS[@]}" "$TORCH")
source scripts/cache_root.sh
ENV=$LLAVA_NEXT_CACHE/lmms_eval_env
NAME=lmms_eval
source scripts/separate_environment.sh

# ------------------------------------------------------------------------------------------------------- arguments

[[ ${1:-} == -h || ${1:-} == --help ]] && { usage; exit 0; }
[[ $# -ge 3 ]] || stop "needs EXPORT and --tasks NAMES or --store STORE; see --help"
[[ -f $1/config.json ]] || stop "$1 is not the directory of a model: it has no config.json"
export_dir=$(cd "$1" && pwd)
case $2 in
    --tasks) tasks=$3 store= ;;
    --store)
        [[ -f $3/manifest.json ]] || stop "$3 is not a prepared source: it has no manifest.json"
        tasks=llava_next_store store=$(cd "$3" && pwd)
        ;;
    *) stop "unknown argument '$2' after EXPORT; known: --tasks, --store" ;;
esac
shift 3

# ------------------------------------------------------------------------------------------------- the environment

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }
if needs_env; then
    new_env LMMS_EVAL_PYTHON
    if has_gpu; then pip install --quiet "$TORCH"; else install_cpu_torch; fi
    pip install --quiet "$TORCH" "${PINS[@]}"
    repair_torchvision
    seal_env
fi

# ------------------------------------------------------------------------------------------------------------ run

# transformers 5 rejects the empty device map that lmms-eval passes by default; half precision is very slow on a CPU.
if has_gpu; then device=cuda dtype=auto; else device=cpu dtype=float32; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=$ROOT/outputs/lmms_eval
for ((i = 1; i < $#; i++)); do
    if [[ ${!i} == --output_path ]]; then
        next=$((i + 1))
        out=$(realpath -m "${!next}")
        set -- "${@:1:i-1}" "${@:i+2}"
        break
    fi
done
if [[ -n $store ]]; then
    ln -s "$store" "$work/store" # relative to the working folder, where the task looks for it
    export HF_HUB_OFFLINE=1
fi
mkdir -p "$out"
touch "$work/started"
(cd "$work" && "$ENV/bin/python" -W ignore -m lmms_eval --model llava_hf \
    --model_args "pretrained=$export_dir,dtype=$dtype,device_map=$device" --device "$device" --batch_size 1 \
    --tasks "$tasks" --include_path "$ROOT/scripts/lmms_eval/tasks" --output_path "$out" --log_samples "$@")
# It exits with 0 after an error too: only a results file shows success.
results=$(find "$out" -name '*_results.json' -newer "$work/started" | sort | tail -n 1)
[[ -n $results ]] || { printf 'lmms_eval: it wrote no results; see its error above\n' >&2; exit 1; }
say "lmms_eval: results in $results, answers beside it"
