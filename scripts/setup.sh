#!/usr/bin/env bash
# Sets up .venv in this checkout, with the versions of constraints.txt. Nothing to do: under a second.
#
#   ./scripts/setup.sh [--extras quickstart,dev,bench,lora,report,tensorboard]
#
# PYTHON             the interpreter to build .venv with (default: the first of 3.13 3.12 3.11 python3 that fits)
# LLAVA_NEXT_PYTHON  use this interpreter's environment as it is, and set nothing up (a container, a module)
# TORCH_BUILD        auto (default): a CPU wheel where there is no NVIDIA driver; cpu; or default: what pip takes
# TORCH_CPU_INDEX    where CPU wheels of torch come from
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
TORCH_BUILD=${TORCH_BUILD:-auto}
VENV=.venv
READY=$VENV/.ready         # written last: what is installed, and from which inputs
BUSY=$VENV/.installing     # stands while packages change: found at the start, it means a half environment
extras=

say() { printf '%s\n' "$*"; }
stop() { printf 'setup: %s\n' "$*" >&2; exit 2; }

while (($#)); do
    case $1 in
        --extras) [[ $# -ge 2 ]] || stop "--extras wants a list such as quickstart,dev"; extras=$2; shift 2 ;;
        --extras=*) extras=${1#*=}; shift ;;
        -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *) stop "unknown argument '$1'; known: --extras quickstart,dev,bench,lora,report,tensorboard" ;;
    esac
done
for extra in ${extras//,/ }; do
    [[ $extra =~ ^(quickstart|dev|bench|lora|report|tensorboard)$ ]] ||
        stop "unknown extra '$extra'; known: quickstart, dev, bench, lora, report, tensorboard"
done
[[ $TORCH_BUILD =~ ^(auto|cpu|default)$ ]] || stop "TORCH_BUILD is auto, cpu or default, not '$TORCH_BUILD'"

system=$(uname -s)
[[ $system == Linux ]] ||
    stop "$system is not supported: DeepSpeed and its launchers want Linux (on Windows: WSL2, which is Linux)."

if [[ -n ${LLAVA_NEXT_PYTHON:-} ]]; then
    "$LLAVA_NEXT_PYTHON" -c 'import deepspeed, hydra, datasets, torch, transformers' >/dev/null ||
        stop "LLAVA_NEXT_PYTHON=$LLAVA_NEXT_PYTHON lacks a package; unset it, and .venv is made instead."
    say "setup: uses $LLAVA_NEXT_PYTHON as it is (LLAVA_NEXT_PYTHON)"
    exit 0
fi

# ------------------------------------------------------------------------------------ what is needed, what is there

has_driver() { [[ -e /proc/driver/nvidia/version || -e /dev/nvidiactl ]] || command -v nvidia-smi >/dev/null 2>&1; }

# One line for an interpreter: "ok", or what it lacks. It is run, not looked up: a pyenv shim exists and fails.
fits() {
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
    local candidate path verdict seen=
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        path=$(command -v "$candidate" 2>/dev/null) || continue
        verdict=$(fits "$path")
        if [[ $verdict == ok ]]; then
            found=$path
            return
        fi
        seen+="${seen:+; }$candidate $verdict"
    done
    stop "no Python fits (${seen:-none found}). Wanted: Python 3.11 or newer with the venv module and the C headers
       that DeepSpeed's ops are compiled with. Debian, Ubuntu: apt-get install python3-dev python3-venv g++
       Fedora: dnf install python3-devel gcc-c++   Another interpreter: PYTHON=/path/to/python3 $0"
}

has_compiler() {
    local compiler
    for compiler in ${CXX:+"$CXX"} c++ g++ clang++; do
        "${compiler%% *}" --version >/dev/null 2>&1 && return
    done
    return 1
}

# What the environment was made from: a change in any of these sets it up anew.
inputs_hash() {
    {
        cat pyproject.toml constraints.txt scripts/setup.sh
        "$VENV/bin/python" -c 'import platform, sys; print(sys.version, platform.machine())'
        pwd -P # the editable install and the scripts in .venv/bin hold this path
    } | sha256sum | cut -d' ' -f1
}

read_ready() { sed -n "s/^$1=//p" "$READY" 2>/dev/null || true; }

# A login node without a driver may share this checkout with nodes that have one: a full build is never undone.
wanted_torch() {
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
    [[ $(read_ready inputs) == "$(inputs_hash)" && $(read_ready torch) == "$(wanted_torch)" ]] || return 1
    local extra have
    have=,$(read_ready extras),
    for extra in ${extras//,/ }; do
        [[ $have == *",$extra,"* ]] || return 1
    done
}

# ----------------------------------------------------------------------------------------------- what is done about it

# step TITLE COMMAND...: prints the title, and the seconds it took. What pip says on failure is shown whole.
step() {
    local title=$1 log=$VENV/setup.log started=$SECONDS code=0
    shift
    printf 'setup: %-58s' "$title"
    "$@" >"$log" 2>&1 || code=$?
    if ((code != 0)); then
        printf 'failed\n'
        cat "$log" >&2
        rm -f "$BUSY" # pip ended by itself and has cleaned up: what is installed is whole
        printf 'setup: "%s" failed (exit code %d, its output stands above). Run it again: what is done is kept.\n' \
            "$title" "$code" >&2
        exit 1
    fi
    printf '%4d s\n' $((SECONDS - started))
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
pip_install() { pip install --quiet --no-compile --no-input -c constraints.txt "$@"; }

# Where a CPU build is wanted, pip is asked first what it would take: a machine may have its own source of CPU wheels.
takes_cuda() {
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
        takes_cuda || code=$?
        case $code in
            0) more=(--index-url "$TORCH_CPU_INDEX") ;;
            1) ;;
            *) return "$code" ;;
        esac
    fi
    # The right version with the wrong build is already "satisfied" for pip: take the old one out.
    [[ $(read_ready torch) == "$torch_build" || ! -e $READY ]] || pip uninstall --quiet --yes torch
    pip_install --no-deps "${more[@]}" torch
}

# deepspeed reads the installed torch while it is built, and the other source packages want only setuptools.
install_project() { pip_install --no-build-isolation -e ".${extras:+[$extras]}"; }

# Python keeps a module's bytecode at its first import, unless the environment forbids it. Then every start of every rank
# would compile torch and transformers anew, for some 20 s. A file of a package that is no Python is no failure.
write_bytecode() { "$VENV/bin/python" -m compileall -q -j 0 "$VENV/lib" || true; }

if is_ready; then
    exit 0
fi

has_compiler || stop "no C++ compiler (c++, g++ or clang++); DeepSpeed compiles its ops with one.
       Debian, Ubuntu: apt-get install g++   Fedora: dnf install gcc-c++"

exec 9>.setup.lock
if command -v flock >/dev/null && ! flock --nonblock 9; then
    say "setup: another setup is at work in this checkout; waiting for it"
    flock 9
    is_ready && exit 0
fi

exec 3>&1 # a trap that runs inside a step would write into that step's log
trap 'printf "\nsetup: interrupted. Run it again: it goes on where it stopped.\n" >&3; exit 130' INT TERM
started=$SECONDS
torch_build=$(wanted_torch)
# Extras that are there already stay.
extras=$(printf '%s\n' "${extras//,/$'\n'}" "$(read_ready extras | tr ',' '\n')" | sed '/^$/d' | sort -u | paste -sd, -)

if [[ -e $BUSY || ! -e $VENV/.made || ! -x $VENV/bin/python ]]; then
    find_python
    say "setup: $("$found" --version) in $VENV, versions of constraints.txt"
    rm -rf "$VENV" # what an interrupted one left
    "$found" -m venv "$VENV" >&2 || stop "$found -m venv $VENV failed (see above)"
    touch "$VENV/.made"
fi
touch "$BUSY"
case $torch_build in
    cpu) note="CPU build" ;;
    *) note="pip's build" ;;
esac
step "pip, setuptools, wheel, ninja" pip_install --upgrade pip setuptools wheel ninja
step "torch ($note)" install_torch
step "this project and what it needs${extras:+ [$extras]}" install_project
[[ -z ${PYTHONDONTWRITEBYTECODE:-} ]] || step "bytecode (PYTHONDONTWRITEBYTECODE is set)" write_bytecode
printf 'inputs=%s\ntorch=%s\nextras=%s\n' "$(inputs_hash)" "$torch_build" "$extras" >"$READY.partial"
mv "$READY.partial" "$READY"
rm -f "$BUSY"
if [[ $torch_build == cpu ]]; then
    say "setup: torch is a CPU build, since there is no NVIDIA driver here (TORCH_BUILD=default $0 takes the other)"
fi
say "setup: ready in $((SECONDS - started)) s; for your own shell: source $VENV/bin/activate"
