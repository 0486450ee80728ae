#!/usr/bin/env bash
# Runs the authors' own code and writes its outputs to tests/oracles/fixtures, which the tests compare with ours: prompts,
# tiles, gradients and twenty optimizer steps of a tiny model, and a plot of those steps beside ours.
#
#   ./scripts/oracles.sh [--check]
#
# --check     writes nothing: reports whether the fixtures are what the authors' code gives now
#
# The authors' code is the package llava-torch, in an environment of its own because it needs old versions. What came
# later (the templates of Llama-3 and Qwen, ChatML's repaired labels, SigLIP towers) is in their repository only: two
# files of it, at a commit and with hashes given below. Where GitHub cannot be reached and a file is not given, the
# fixtures that need it are left as they are. The programs are in tests/oracles/authors.
#
# LLAVA_NEXT_CACHE     folder of the assets and the environment (default: llava_next in $XDG_CACHE_HOME or ~/.cache)
# LLAVA_NEXT_TRAIN_PY  a copy of llava/train/train.py of LLaVA-VL/LLaVA-NeXT, if there is one
# LLAVA_NEXT_SIGLIP_PY a copy of llava/model/multimodal_encoder/siglip_encoder.py
# ORACLE_PYTHON        Python 3.11 or 3.12 for the environment (default: the first of python3.11 python3.12)
# TORCH_CPU_INDEX      index of CPU wheels of torch, used where pip would install a CUDA build
set -euo pipefail
cd "$(dirname "$0")/.."

COMMIT=df179663ae8b83207df100a1f7af24caec633ff9
TRAIN_PY=llava/train/train.py
TRAIN_SHA256=29a796981630025ffa9adf9f009108810f3582095d453c3f9113c2f38a80fa41
SIGLIP_PY=llava/model/multimodal_encoder/siglip_encoder.py
SIGLIP_SHA256=09b0e16ed6f0281d86f39fb2ad1c938cb684d8df5272f8b952c3f9e41156cfc3
# PINS: versions for the authors' packages of early 2024. LATER: versions that their repository required when Llama-3 and
# Qwen were added; they precede the first on the path.
PINS=(transformers==4.36.2 tokenizers==0.15.2 accelerate==0.21.0 numpy==1.26.4 pillow==13.0.0 sentencepiece==0.2.3
    protobuf==7.36.2 huggingface-hub==0.36.2 safetensors==0.8.0 einops==0.8.2 requests==2.34.2 psutil==7.2.2 pyyaml==6.0.3
    matplotlib==3.10.9)
AUTHORS=(llava-torch==1.2.2.post1)
LATER=(transformers==4.40.2 tokenizers==0.19.1 jinja2==3.1.6 markupsafe==3.0.4)
TORCH=torch==2.13.0
STAMP=$(printf '%s\n' "${PINS[@]}" "${AUTHORS[@]}" "${LATER[@]}" "$TORCH")
source scripts/cache_root.sh
CACHE=$LLAVA_NEXT_CACHE
ENV=$CACHE/oracle_env
NAME=oracles
source scripts/separate_environment.sh

check=()
case ${1:-} in
    "") ;;
    --check) check=(--check) ;;
    -h | --help) usage; exit 0 ;;
    *) stop "unknown argument '$1'; known: --check" ;;
esac

mkdir -p "$CACHE"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES="" TRANSFORMERS_VERBOSITY=error

# ------------------------------------------------------------------------------------------------ tokenizers, code

./scripts/setup.sh --extras quickstart
ours=${LLAVA_NEXT_PYTHON:-.venv/bin/python}
"$ours" scripts/quickstart/assets.py --cache "$CACHE" --set tokenizers

train_py=${LLAVA_NEXT_TRAIN_PY:-$CACHE/downloads/llava_next_train_${COMMIT:0:8}.py}
siglip_py=${LLAVA_NEXT_SIGLIP_PY:-$CACHE/downloads/llava_next_siglip_encoder_${COMMIT:0:8}.py}
has() { [[ -f $1 && $(sha256sum "$1" | cut -d' ' -f1) == "$2" ]]; }

# fetch_source FILE PATH SHA256 VARIABLE: fetches PATH of the repository to FILE, unless VARIABLE names FILE.
fetch_source() {
    local file=$1 path=$2 sha256=$3 variable=$4 url=https://raw.githubusercontent.com/LLaVA-VL/LLaVA-NeXT/$COMMIT/$2
    if has "$file" "$sha256"; then return; fi
    [[ -z ${!variable:-} ]] || stop "$variable=$file is not $path of commit $COMMIT (sha256 $sha256)"
    mkdir -p "$(dirname "$file")"
    if curl --fail --silent --location --max-time 60 --output "$file.partial" "$url" &&
        mv "$file.partial" "$file" && has "$file" "$sha256"; then
        say "oracles: fetched $path of LLaVA-NeXT ${COMMIT:0:8} and checked its sha256"
    else
        rm -f "$file" "$file.partial"
        say "oracles: $url could not be fetched; the fixtures that need it are left as they are"
    fi
}
fetch_source "$train_py" "$TRAIN_PY" "$TRAIN_SHA256" LLAVA_NEXT_TRAIN_PY
fetch_source "$siglip_py" "$SIGLIP_PY" "$SIGLIP_SHA256" LLAVA_NEXT_SIGLIP_PY

# --------------------------------------------------------------------------------------------------- the environment

if needs_env; then
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
# write PROGRAM ARGUMENT...: one of tests/oracles/authors. write_later: the same, under the later versions.
write() { "$python" -W ignore -m "tests.oracles.authors.$1" "${@:2}" "${check[@]}" || code=1; }
write_later() { PYTHONPATH=$ENV/later write "$@"; }

write anyres
write decoded_images
write prompts
write gradients
write steps
"$ours" -m tests.oracles.our_steps "${check[@]}" || code=1
write plot_steps
if has "$train_py" "$TRAIN_SHA256"; then
    write later_prompts --train-py "$train_py" --templates chatml_direct
    write_later later_prompts --train-py "$train_py" --templates qwen_1_5 llava_llama_3
    write unreadable_images --train-py "$train_py"
fi
if has "$siglip_py" "$SIGLIP_SHA256"; then
    write_later siglip_pixels --siglip-py "$siglip_py"
fi
say "oracles: done in $((SECONDS - started)) s; compare with: python -m pytest tests/oracles"
exit $code
