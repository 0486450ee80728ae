# shellcheck shell=bash
# What the scripts share that keep an environment of their own, since they want other versions than training:
# lmms_eval.sh, oracles.sh, vllm_env.sh. Sourced; what is installed, and what is done with it, stands in them.
#
# They set before they call:
#   NAME              what their sentences begin with
#   ENV               the environment's folder
#   TORCH             torch, with its version
#   STAMP             all that is installed: another stamp, and the environment is made anew
# TORCH_CPU_INDEX     where CPU wheels of torch come from, where pip would take a CUDA build

TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf '%s\n' "$*"; }
stop() { printf '%s: %s\n' "$NAME" "$*" >&2; exit 2; }
usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; }

is_ready() { [[ $(cat "$ENV/.ready" 2>/dev/null) == "$STAMP" ]]; }

# new_env VARIABLE: an empty environment, by the interpreter that VARIABLE of the caller's shell names, or one that fits.
new_env() {
    local candidate found=
    for candidate in ${!1:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys, venv; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    [[ -n $found ]] ||
        stop "no Python 3.11 or 3.12 with its venv module, which these versions want; name one with $1=/path/to/python3.11"
    env_started=$SECONDS
    say "$NAME: sets up $ENV ($("$found" --version)); this takes minutes"
    rm -rf "$ENV"
    mkdir -p "$(dirname "$ENV")"
    "$found" -m venv "$ENV"
}

pip() { "$ENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

# Whether pip left to itself would take a CUDA build, gigabytes that nothing here uses.
takes_cuda() {
    pip install --quiet --dry-run --ignore-installed --no-deps --report "$ENV/torch.json" "$TORCH" >&2
    grep -qE '"(nvidia|cuda|triton)' "$ENV/torch.json"
}

install_cpu_torch() {
    local index=()
    if takes_cuda; then index=(--index-url "$TORCH_CPU_INDEX"); fi
    pip install --quiet "${index[@]}" "$TORCH"
}

# A CUDA build of torchvision beside a CPU build of torch: it looks for two operators that only it could bring. In
# sitecustomize, since programs start processes of their own.
mend_torchvision() {
    if "$ENV/bin/python" -c 'import torchvision' 2>/dev/null; then return; fi
    cat >"$("$ENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py" <<'PY'
import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PY
}

# The last thing: a script that was interrupted before makes the environment anew.
seal_env() {
    printf '%s\n' "$STAMP" >"$ENV/.ready"
    say "$NAME: the environment is ready, $((SECONDS - env_started)) s"
}
