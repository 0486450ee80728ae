#!/usr/bin/env bash
# Runs the authors' own code and keeps what it says in tests/oracles/*.json, which the tests compare ours with: prompts,
# tiles, gradients and twenty optimizer steps of a tiny model; and draws those steps beside ours.
#
#   ./scripts/oracles.sh [--check]
#
# --check     writes nothing: tells whether the fixtures in tests/oracles are what the authors' code says now
# The authors' code is the package llava-torch, in an environment of its own: it wants old versions. What came later
# (the templates of Llama-3 and Qwen, ChatML's repaired labels, SigLIP towers) is in their repository only: two files of
# it, at a commit and with hashes written here. Where GitHub cannot be reached and a file is not given, the fixtures that
# are made with it stay as they are.
#
# LLAVA_NEXT_CACHE     where assets and the environment are kept (default: ~/.cache/llava_next)
# LLAVA_NEXT_TRAIN_PY  one of them, llava/train/train.py of LLaVA-VL/LLaVA-NeXT, if there is a copy already
# LLAVA_NEXT_SIGLIP_PY the other, llava/model/multimodal_encoder/siglip_encoder.py
# ORACLE_PYTHON        Python 3.11 or 3.12 for the environment (default: the first of python3.11 python3.12)
# TORCH_CPU_INDEX      where CPU wheels of torch come from, where pip would take a CUDA build
set -euo pipefail
cd "$(dirname "$0")/.."

COMMIT=df179663ae8b83207df100a1f7af24caec633ff9
TRAIN_PY=llava/train/train.py
TRAIN_SHA256=29a796981630025ffa9adf9f009108810f3582095d453c3f9113c2f38a80fa41
SIGLIP_PY=llava/model/multimodal_encoder/siglip_encoder.py
SIGLIP_SHA256=09b0e16ed6f0281d86f39fb2ad1c938cb684d8df5272f8b952c3f9e41156cfc3
# What the authors' packages of early 2024 run with (the first), and what their repository named when it learnt
# Llama-3 and Qwen (the second, put in front of the first).
PINS=(transformers==4.36.2 tokenizers==0.15.2 accelerate==0.21.0 numpy==1.26.4 pillow==13.0.0 sentencepiece==0.2.3
    protobuf==7.36.2 huggingface-hub==0.36.2 safetensors==0.8.0 einops==0.8.2 requests==2.34.2 psutil==7.2.2 pyyaml==6.0.3
    matplotlib==3.10.9)
AUTHORS=(llava-torch==1.2.2.post1)
LATER=(transformers==4.40.2 tokenizers==0.19.1 jinja2==3.1.6 markupsafe==3.0.4)
TORCH=torch==2.13.0
STAMP=$(printf '%s\n' "${PINS[@]}" "${AUTHORS[@]}" "${LATER[@]}" "$TORCH")
CACHE=${LLAVA_NEXT_CACHE:-$HOME/.cache/llava_next}
ENV=$CACHE/oracle_env
NAME=oracles
source scripts/own_env.sh

check=()
case ${1:-} in
    "") ;;
    --check) check=(--check) ;;
    -h | --help) usage; exit 0 ;;
    *) stop "unknown argument '$1'; known: --check" ;;
esac

mkdir -p "$CACHE"
export LLAVA_NEXT_CACHE=$CACHE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES="" TRANSFORMERS_VERBOSITY=error

# ------------------------------------------------------------------------------------------------ tokenizers, code

./scripts/setup.sh --extras quickstart
ours=${LLAVA_NEXT_PYTHON:-.venv/bin/python}
"$ours" scripts/quickstart/assets.py --cache "$CACHE" --set tokenizers

train_py=${LLAVA_NEXT_TRAIN_PY:-$CACHE/downloads/llava_next_train_${COMMIT:0:8}.py}
siglip_py=${LLAVA_NEXT_SIGLIP_PY:-$CACHE/downloads/llava_next_siglip_encoder_${COMMIT:0:8}.py}
has() { [[ -f $1 && $(sha256sum "$1" | cut -d' ' -f1) == "$2" ]]; }

# ensure FILE PATH SHA256 VARIABLE: fetches PATH of the repository to FILE, unless VARIABLE names FILE.
ensure() {
    local file=$1 path=$2 sha256=$3 variable=$4 url=https://raw.githubusercontent.com/LLaVA-VL/LLaVA-NeXT/$COMMIT/$2
    if has "$file" "$sha256"; then return; fi
    [[ -z ${!variable:-} ]] || stop "$variable=$file is not $path of commit $COMMIT (sha256 $sha256)"
    mkdir -p "$(dirname "$file")"
    if curl --fail --silent --location --max-time 60 --output "$file.partial" "$url" &&
        mv "$file.partial" "$file" && has "$file" "$sha256"; then
        say "oracles: fetched $path of LLaVA-NeXT ${COMMIT:0:8}, sha256 is right"
    else
        rm -f "$file" "$file.partial"
        say "oracles: $url could not be fetched; the fixtures that are made with it stay as they are"
    fi
}
ensure "$train_py" "$TRAIN_PY" "$TRAIN_SHA256" LLAVA_NEXT_TRAIN_PY
ensure "$siglip_py" "$SIGLIP_PY" "$SIGLIP_SHA256" LLAVA_NEXT_SIGLIP_PY

# --------------------------------------------------------------------------------------------------- the environment

if ! is_ready; then
    new_env ORACLE_PYTHON
    install_cpu_torch
    pip install --quiet "${PINS[@]}"
    pip install --quiet --no-deps "${AUTHORS[@]}"
    pip install --quiet --no-deps --target "$ENV/later" "${LATER[@]}"
    seal_env
fi

# -------------------------------------------------------------------------------------------------------- fixtures

started=$SECONDS
python=$ENV/bin/python
code=0
"$python" -W ignore -m scripts.oracles.anyres "${check[@]}" || code=1
"$python" -W ignore -m scripts.oracles.loaded "${check[@]}" || code=1
"$python" -W ignore -m scripts.oracles.prompts "${check[@]}" || code=1
"$python" -W ignore -m scripts.oracles.gradients "${check[@]}" || code=1
"$python" -W ignore -m scripts.oracles.steps "${check[@]}" || code=1
"$ours" -m scripts.oracles.our_steps "${check[@]}" || code=1
"$python" -W ignore -m scripts.oracles.draw_steps "${check[@]}" || code=1
if has "$train_py" "$TRAIN_SHA256"; then
    "$python" -W ignore -m scripts.oracles.later_prompts --train-py "$train_py" --templates chatml_direct "${check[@]}" || code=1
    PYTHONPATH=$ENV/later "$python" -W ignore -m scripts.oracles.later_prompts --train-py "$train_py" \
        --templates qwen_1_5 llava_llama_3 "${check[@]}" || code=1
    "$python" -W ignore -m scripts.oracles.unreadable --train-py "$train_py" "${check[@]}" || code=1
fi
if has "$siglip_py" "$SIGLIP_SHA256"; then
    PYTHONPATH=$ENV/later "$python" -W ignore -m scripts.oracles.squash --siglip-py "$siglip_py" "${check[@]}" || code=1
fi
say "oracles: done in $((SECONDS - started)) s; compare with: python -m pytest tests/oracles"
exit $code
