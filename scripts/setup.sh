#!/usr/bin/env bash
# Installs this project into .venv of this checkout, with the versions of constraints.txt. Takes less than a second if
# everything is installed.
#
#   ./scripts/setup.sh [--extras quickstart,dev,bench,lora,tensorboard,heif,trl]
#
# PYTHON             interpreter of .venv (default: the first suitable one of python3.13 python3.12 python3.11 python3)
# LLAVA_NEXT_PYTHON  use the environment of this interpreter unchanged, and install nothing (a container, a module)
# TORCH_BUILD        auto (default): a CPU wheel where there is no NVIDIA driver; cpu; or default: pip's choice
# TORCH_CPU_INDEX    index of CPU wheels of torch
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
TORCH_BUILD=${TORCH_BUILD:-auto}
VENV=.venv
READY=$VENV/.ready         # written last: the installed extras, and the hash of the inputs
BUSY=$VENV/.installing     # exists while packages change; if it exists at the start, the environment is incomplete
extras=

say() { printf '%s\n' "$*"; }
stop() { printf 'setup: %s\n' "$*" >&2; exit 2; }

while (($#)); do
    case $1 in
        --extras) [[ $# -ge 2 ]] || stop "--extras needs a list such as quickstart,dev"; extras=$2; shift 2 ;;
        --extras=*) extras=${1#*=}; shift ;;
        -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *) stop "unknown argument '$1'; known: --extras quickstart,dev,bench,lora,tensorboard,heif,trl" ;;
    esac
done
for extra in ${extras//,/ }; do
    [[ $extra =~ ^(quickstart|dev|bench|lora|tensorboard|heif|trl)$ ]] ||
        stop "unknown extra '$extra'; known: quickstart, dev, bench, lora, tensorboard, heif, trl"
done
[[ $TORCH_BUILD =~ ^(auto|cpu|default)$ ]] || stop "TORCH_BUILD=$TORCH_BUILD is not one of auto, cpu, default"

system=$(uname -s)
[[ $system == Linux ]] ||
    stop "$system is not supported: DeepSpeed and its launchers need Linux (on Windows: WSL2)."

if [[ -n ${LLAVA_NEXT_PYTHON:-} ]]; then
    "$LLAVA_NEXT_PYTHON" -c 'import deepspeed, hydra, datasets, torch, transformers' >/dev/null ||
        stop "LLAVA_NEXT_PYTHON=$LLAVA_NEXT_PYTHON lacks a package; unset it to use .venv instead."
    say "setup: using $LLAVA_NEXT_PYTHON unchanged (LLAVA_NEXT_PYTHON)"
    exit 0
fi

# ------------------------------------------------------------------------------------------- requirements and state

has_driver() { [[ -e /proc/driver/nvidia/version || -e /dev/nvidiactl ]] || command -v nvidia-smi >/dev/null 2>&1; }

# One line about an interpreter: "ok", or what it lacks. It is started, since a pyenv shim may exist and fail.
check_python() {
    "$1" - 2>/dev/null <<'PY' || say "does not start"
import pathlib, sys, sysconfig
if sys.version_info < (3, 11):
    print("is older than 3.11")
    raise SystemExit
try:
    import ensurepip, venv
except ImportError:
    print("has no venv module")
    raise SystemExit
header = pathlib.Path(sysconfig.get_paths()["include"], "Python.h")
print("ok" if header.is_file() else "has no C headers (Python.h)")
PY
}

find_python() {
    local candidate path result rejected=
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        path=$(command -v "$candidate" 2>/dev/null) || continue
        result=$(check_python "$path")
        if [[ $result == ok ]]; then
            python=$path
            return
        fi
        rejected+="${rejected:+; }$candidate $result"
    done
    stop "no suitable Python (${rejected:-none found}). Required: Python 3.11 or newer with the venv module and the C
       headers that DeepSpeed's ops are compiled with. Debian, Ubuntu: apt-get install python3-dev python3-venv g++
       Fedora: dnf install python3-devel gcc-c++   Another interpreter: PYTHON=/path/to/python3 $0"
}

has_compiler() {
    local compiler
    for compiler in ${CXX:+"$CXX"} c++ g++ clang++; do
        "${compiler%% *}" --version >/dev/null 2>&1 && return
    done
    return 1
}

# Everything that decides the environment; it is installed again when one of these changes.
inputs_hash() {
    {
        cat pyproject.toml constraints.txt scripts/setup.sh
        "$VENV/bin/python" -c 'import platform, sys; print(sys.version, platform.machine())'
        pwd -P # the editable install and the scripts in .venv/bin hold this path
    } | sha256sum | cut -d' ' -f1
}

read_ready() { sed -n "s/^$1=//p" "$READY" 2>/dev/null || true; }

# A login node without a driver may share this checkout with nodes that have one, so a CUDA build is never replaced.
choose_torch_build() {
    if [[ $TORCH_BUILD != auto ]]; then
        say "$TORCH_BUILD"
    elif has_driver || [[ $(read_ready torch) == default ]]; then
        say default
    else
        say cpu
    fi
}

is_ready() {
    [[ -e $READY && ! -e $BUSY && -x $VENV/bin/python ]] || return 1
    [[ $(read_ready inputs) == "$(inputs_hash)" && $(read_ready torch) == "$(choose_torch_build)" ]] || return 1
    local extra have
    have=,$(read_ready extras),
    for extra in ${extras//,/ }; do
        [[ $have == *",$extra,"* ]] || return 1
    done
}

# ----------------------------------------------------------------------------------------------------- installation

# step TITLE COMMAND...: prints the title and the seconds; after a failure the whole output.
step() {
    local title=$1 log=$VENV/setup.log started=$SECONDS code=0
    shift
    printf 'setup: %-58s' "$title"
    "$@" >"$log" 2>&1 || code=$?
    if ((code != 0)); then
        printf 'failed\n'
        cat "$log" >&2
        rm -f "$BUSY" # pip has ended and cleaned up: the installed packages are complete
        printf 'setup: "%s" failed (exit code %d, see its output above). Run it again; finished steps are kept.\n' \
            "$title" "$code" >&2
        exit 1
    fi
    printf '%4d s\n' $((SECONDS - started))
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
pip_install() { pip install --quiet --no-compile --no-input -c constraints.txt "$@"; }

# Whether pip would install a CUDA build. Asked before the CPU index is used: pip may be configured for CPU wheels.
would_install_cuda() {
    local report=$VENV/torch.json
    pip install --quiet --dry-run --ignore-installed --no-deps --report "$report" -c constraints.txt torch >&2 || return 2
    "$VENV/bin/python" - "$report" <<'PY'
import json, sys
with open(sys.argv[1]) as file:
    metadata = json.load(file)["install"][0]["metadata"]
needs = [name.lower() for name in metadata.get("requires_dist", ())]
raise SystemExit(0 if any(name.startswith(("nvidia", "cuda", "triton")) for name in needs) else 1)
PY
}

install_torch() {
    local code=0
    local -a more=()
    if [[ $torch_build == cpu ]]; then
        would_install_cuda || code=$?
        case $code in
            0) more=(--index-url "$TORCH_CPU_INDEX") ;;
            1) ;;
            *) return "$code" ;;
        esac
    fi
    # For pip the right version with the wrong build is already "satisfied", so the old one is removed.
    [[ $(read_ready torch) == "$torch_build" || ! -e $READY ]] || pip uninstall --quiet --yes torch
    pip_install --no-deps "${more[@]}" torch
}

# deepspeed reads the installed torch while it is built; the other source packages need setuptools only.
install_project() { pip_install --no-build-isolation -e ".${extras:+[$extras]}"; }

# With PYTHONDONTWRITEBYTECODE Python would compile torch and transformers at every start of every rank, for some 20 s.
# Importing the programs writes the bytecode of what they use, in half of the time that all installed packages take.
write_bytecode() {
    env -u PYTHONDONTWRITEBYTECODE "$VENV/bin/python" -c "
import data_recipes.prepare, train.evaluate.__main__, train.report.__main__, train.run
import transformers.models.clip.modeling_clip, transformers.models.dinov2.modeling_dinov2
import transformers.models.llama.modeling_llama, transformers.models.llava_next.modeling_llava_next"
}

if is_ready; then
    exit 0
fi

has_compiler || stop "no C++ compiler (c++, g++ or clang++); DeepSpeed compiles its ops with one.
       Debian, Ubuntu: apt-get install g++   Fedora: dnf install gcc-c++"

exec 9>.setup.lock
if command -v flock >/dev/null && ! flock --nonblock 9; then
    say "setup: another setup runs in this checkout; waiting for it"
    flock 9
    is_ready && exit 0
fi

exec 3>&1 # for the trap, which could run inside a step, whose output goes to a log
trap 'printf "\nsetup: interrupted. Run it again to continue.\n" >&3; exit 130' INT TERM
started=$SECONDS
torch_build=$(choose_torch_build)
# Installed extras are kept.
extras=$(printf '%s\n' "${extras//,/$'\n'}" "$(read_ready extras | tr ',' '\n')" | sed '/^$/d' | sort -u | paste -sd, -)

if [[ -e $BUSY || ! -e $VENV/.made || ! -x $VENV/bin/python ]]; then
    find_python
    say "setup: $("$python" --version) in $VENV, versions of constraints.txt"
    rm -rf "$VENV" # of an interrupted setup
    "$python" -m venv "$VENV" >&2 || stop "$python -m venv $VENV failed (see above)"
    touch "$VENV/.made"
fi
touch "$BUSY"
case $torch_build in
    cpu) note="CPU build" ;;
    *) note="pip's build" ;;
esac
step "pip, setuptools, wheel, ninja" pip_install --upgrade pip setuptools wheel ninja
step "torch ($note)" install_torch
step "this project and its requirements${extras:+ [$extras]}" install_project
[[ -z ${PYTHONDONTWRITEBYTECODE:-} ]] || step "bytecode (PYTHONDONTWRITEBYTECODE is set)" write_bytecode
printf 'inputs=%s\ntorch=%s\nextras=%s\n' "$(inputs_hash)" "$torch_build" "$extras" >"$READY.partial"
mv "$READY.partial" "$READY"
rm -f "$BUSY"
if [[ $torch_build == cpu ]]; then
    say "setup: torch is a CPU build, since there is no NVIDIA driver (for a CUDA build: TORCH_BUILD=default $0)"
fi
say "setup: ready in $((SECONDS - started)) s; for your shell: source $VENV/bin/activate"
