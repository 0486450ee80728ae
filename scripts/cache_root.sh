# shellcheck shell=bash
# The folder of files that can be made again, for this script and the programs that it starts. Sourced; the rule is that of
# llava_next/cache_root.py.
if [[ -z ${LLAVA_NEXT_CACHE:-} && -z ${XDG_CACHE_HOME:-} && -z ${HOME:-} ]]; then
    printf '%s: HOME is not set; set LLAVA_NEXT_CACHE to a folder for files that can be made again\n' "${0##*/}" >&2
    exit 2
fi
LLAVA_NEXT_CACHE=${LLAVA_NEXT_CACHE:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/llava_next}
export LLAVA_NEXT_CACHE
