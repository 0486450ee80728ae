#!/usr/bin/env bash
# Every check that runs no test: formatting, lint, types, import directions, shell scripts.
# All of them run, also after one has failed. To repair what can be repaired: ruff format && ruff check --fix
set -uo pipefail
cd "$(dirname "$0")/.." || exit

./scripts/setup.sh --extras dev || exit
PATH=$(dirname "${LLAVA_NEXT_PYTHON:-$PWD/.venv/bin/python}"):$PATH
failed=()

# check TITLE COMMAND...: its output is shown where it fails; its seconds always.
check() {
    local title=$1 started=$SECONDS output
    shift
    if output=$("$@" 2>&1); then
        printf 'check: %-36s ok   %3d s\n' "$title" $((SECONDS - started))
    else
        printf 'check: %-36s FAILED\n%s\n' "$title" "$output"
        failed+=("$title")
    fi
}

shell_scripts() {
    local -a files
    mapfile -t files < <(find .ci scripts tests -type f \( -name '*.sh' -o -name '*.sbatch' -o -path .ci/run \) | sort)
    if command -v shellcheck >/dev/null; then
        shellcheck --external-sources "${files[@]}"
    else
        local file # only their syntax: shellcheck has no wheel for every machine
        for file in "${files[@]}"; do bash -n "$file" || return; done
    fi
}

check "formatting (ruff format)" ruff format --check .
check "lint (ruff check)" ruff check .
check "types (mypy)" mypy
check "import directions (import-linter)" lint-imports
if command -v shellcheck >/dev/null; then
    check "shell scripts (shellcheck)" shell_scripts
else
    check "shell scripts (bash -n: no shellcheck)" shell_scripts
fi

if ((${#failed[@]})); then
    list=$(printf ', %s' "${failed[@]}")
    printf 'check: %d failed: %s\n' "${#failed[@]}" "${list#, }"
    exit 1
fi
