#!/usr/bin/env bash
# All checks that run no test: formatting, lint, types, import directions, shell scripts, the documentation's build. All of
# them run, also after one has failed. Automatic fixes: ruff format && ruff check --fix
set -uo pipefail
cd "$(dirname "$0")/.." || exit

./scripts/setup.sh --extras dev || exit
PATH=$(dirname "${LLAVA_NEXT_PYTHON:-$PWD/.venv/bin/python}"):$PATH
failed=()

# check TITLE COMMAND...: prints the seconds, and the output after a failure.
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
        local file # the syntax only: shellcheck has no wheel for some machines
        for file in "${files[@]}"; do bash -n "$file" || return; done
    fi
}

# Not the whole checkout: a cache or an environment in it holds code, and ruff configurations, of others.
own=(llava_next data_recipes train scripts tests setup.py)
check "formatting (ruff format)" ruff format --check "${own[@]}"
check "lint (ruff check)" ruff check "${own[@]}"
check "types (mypy)" mypy
check "import directions (import-linter)" lint-imports
if command -v shellcheck >/dev/null; then
    check "shell scripts (shellcheck)" shell_scripts
else
    check "shell scripts (bash -n: no shellcheck)" shell_scripts
fi
check "documentation (mkdocs)" mkdocs build --strict --quiet --site-dir "$(mktemp -d)"

if ((${#failed[@]})); then
    list=$(printf ', %s' "${failed[@]}")
    printf 'check: %d failed: %s\n' "${#failed[@]}" "${list#, }"
    exit 1
fi
