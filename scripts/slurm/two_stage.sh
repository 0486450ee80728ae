#!/usr/bin/env bash
# Submits both stages of one run; the second starts when the first has ended with exit code 0.
#
#   ./scripts/slurm/two_stage.sh [options of sbatch] -- name=NAME [KEY=VALUE ...] [align:KEY=VALUE ...] [finetune:KEY=VALUE ...]
#
#   ./scripts/slurm/two_stage.sh -N 4 --time=12:00:00 -- name=llava_7b model/language_model=vicuna_7b \
#       align:mixture=lcs_558k finetune:mixture=llava_next_779k finetune:engine=zero3
#
# A key without a prefix applies to both stages. Another pair of stages: align:stage=llava_1_5/align finetune:stage=llava_1_5/finetune
# Prints the two job ids. Submitted again, each stage continues from its last checkpoint; a finished one ends at once.
set -euo pipefail
cd "$(dirname "$0")/../.."
for variable in $(compgen -e SLURM_); do # of the job or the shell of salloc that this script may run in
    [[ $variable == SLURM_CONF ]] || unset "$variable"
done
source scripts/slurm/site.sh

options=()
while (($#)) && [[ $1 != -- ]]; do
    [[ $1 == -h || $1 == --help ]] && { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0; }
    options+=("$1")
    shift
done
if ((!$#)); then
    echo "error: -- is missing between the options of sbatch and those of the run; see $0 --help" >&2
    exit 2
fi
shift

# submit STAGE [options of sbatch] -- arguments: submits the stage with its arguments, without their prefix.
submit() {
    local stage=$1 argument arguments=() options=() has_stage=
    shift
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    for argument in "${@:2}"; do
        case $argument in
            "$stage":*) arguments+=("${argument#*:}") ;;
            align:* | finetune:*) ;;
            *) arguments+=("$argument") ;;
        esac
    done
    for argument in "${arguments[@]}"; do
        [[ $argument == stage=* ]] && has_stage=1
    done
    [[ -n $has_stage ]] || arguments+=("stage=$stage")
    sbatch --parsable --job-name="$stage" "${options[@]}" scripts/slurm/train.sbatch "${arguments[@]}"
}

first=$(submit align "${options[@]}" -- "$@")
first=${first%%;*}
second=$(submit finetune --dependency="afterok:$first" --kill-on-invalid-dep=yes "${options[@]}" -- "$@")
echo "align $first"
echo "finetune ${second%%;*}"
