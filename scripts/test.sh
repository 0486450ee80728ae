#!/usr/bin/env bash
# Installs the environment, runs the checks, then the tests.
#
#   ./scripts/test.sh [quick|full] [arguments for pytest]
#
# quick (default)  eight to nine minutes on two cores; at least one case of almost every property
# full             everything: kills, Slurm, vLLM, oracles, many ranks; over an hour on two cores. It needs scripts/oracles.sh,
#                  vllm_env.sh, lmms_eval.sh and apt-get install slurm-wlm munge pdsh openssh-server
# Tests that need a GPU are skipped, with that reason, on machines without one.
set -euo pipefail
cd "$(dirname "$0")/.."

tier=quick
case ${1:-} in
    quick | full) tier=$1; shift ;;
    -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
esac
case $tier in
    quick) marks="not full" ;;
    full) marks="" ;;
esac

./scripts/setup.sh --extras quickstart,dev,bench,lora,heif,trl
PATH=$(dirname "${LLAVA_NEXT_PYTHON:-$PWD/.venv/bin/python}"):$PATH
export PATH
./scripts/check.sh

# Most tests of several ranks have two: each gets half of the cores.
half=$(($(nproc) / 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((half < 1 ? 1 : half > 8 ? 8 : half))}
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE=${WANDB_MODE:-disabled} TOKENIZERS_PARALLELISM=false

# Two processes (-n N in the arguments changes this), because many tests wait for programs and ranks. The tests of one
# file stay together: they share ranks and runs.
# -rs: the reason of every skipped test, which has the command that makes it run.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$marks" --durations=15 -rs "$@"
