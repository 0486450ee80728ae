# shellcheck shell=bash
# Functions that make a Python environment with other versions than training needs. Sourced by lmms_eval.sh, oracles.sh
# and vllm_env.sh, which install the packages.
#
# Set these before the first call:
#   NAME              prefix of the messages
#   ENV               the environment's folder
#   TORCH             torch, with its version
#   STAMP             everything that is installed; the environment is made again when this text changes
# TORCH_CPU_INDEX     index of CPU wheels of torch, used where pip would install a CUDA build

TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf '%s\n' "$*"; }
stop() { printf '%s: %s\n' "$NAME" "$*" >&2; exit 2; }
usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; }

is_ready() { [[ $(cat "$ENV/.ready" 2>/dev/null) == "$STAMP" ]]; }

# needs_env: whether the environment must be made. Then the caller holds its lock until seal_env or the end of the
# script: another script that needs the same environment waits here, and finds it ready.
needs_env() {
    if is_ready; then return 1; fi
    mkdir -p "$(dirname "$ENV")"
    exec {env_lock}>"$ENV.lock" || stop "$ENV.lock cannot be written; set LLAVA_NEXT_CACHE to another folder"
    if command -v flock >/dev/null && ! flock --nonblock "$env_lock"; then
        say "$NAME: another process makes $ENV; waiting for it"
        flock "$env_lock"
    fi
    if is_ready; then
        exec {env_lock}>&-
        return 1
    fi
}

# new_env VARIABLE: makes an empty environment, with the interpreter that the variable names, or the first that fits.
new_env() {
    local candidate python=
    for candidate in ${!1:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys, venv; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [[ -n $python ]] ||
        stop "no Python 3.11 or 3.12 with its venv module, which these versions need; name one with $1=/path/to/python3.11"
    env_started=$SECONDS
    say "$NAME: making $ENV ($("$python" --version)); this takes minutes"
    rm -rf "$ENV"
    "$python" -m venv "$ENV"
}

pip() { "$ENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

# Whether pip would install a CUDA build by default: gigabytes that are not needed here.
would_install_cuda() {
    pip install --quiet --dry-run --ignore-installed --no-deps --report "$ENV/torch.json" "$TORCH" >&2
    grep -qE '"(nvidia|cuda|triton)' "$ENV/torch.json"
}

install_cpu_torch() {
    local index=()
    if would_install_cuda; then index=(--index-url "$TORCH_CPU_INDEX"); fi
    pip install --quiet "${index[@]}" "$TORCH"
}

# A CUDA build of torchvision beside a CPU build of torch looks for two operators that are not there; they are defined in
# sitecustomize, so that child processes have them too.
repair_torchvision() {
    if "$ENV/bin/python" -c 'import torchvision' 2>/dev/null; then return; fi
    cat >"$("$ENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py" <<'PY'
import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PY
}

# The last step: after an interruption before it, the environment is made again.
seal_env() {
    printf '%s\n' "$STAMP" >"$ENV/.ready"
    say "$NAME: the environment is ready, $((SECONDS - env_started)) s"
    exec {env_lock}>&-
}
