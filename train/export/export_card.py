"""The model card of an export: its README.md, for whoever finds the directory without the run.

Owns the wording; the facts are the run's configuration and its data.json.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import AutoConfig

from llava_next.model.released import ARCHITECTURES
from llava_next.model.towers import TOWER_FAMILIES, unsupported_by_stock
from train.config.schema import RunConfig
from train.distributed.versions import versions
from train.export.exported_model import Source


def card(source: Source, layout: str, checks: Sequence[str]) -> str:
    """The card as Markdown.

    Args:
        layout: hf or original.
        checks: sentences on what was verified, or was not.
    """
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "---", ""]
    lines += [f"# {_name(source)}", ""]
    lines += [f"Exported from {source.words}.", ""]
    lines += ["## What it runs in", "", *(f"- {line}" for line in servers(source, layout)), ""]
    if source.config is not None:
        lines += ["## Recipe", "", *_table(("key", "value"), _recipe(source.config)), ""]
    lines += ["## Data", "", *_data(source.about), ""]
    lines += ["## Checked at the export", "", *(f"- {check}" for check in checks), ""]
    made = {f"trained with {key}": value for key, value in source.versions.items()}
    made |= {f"exported with {key}": value for key, value in versions().items()}
    lines += ["## Versions", "", *_table(("what", "version"), made.items())]
    return "\n".join(lines) + "\n"


def servers(source: Source, layout: str) -> Iterator[str]:
    """What loads the export, and what does not, as sentences."""
    vision = AutoConfig.for_model(**source.stock["vision_config"])
    tower, family = vision.model_type, TOWER_FAMILIES[vision.model_type]
    language = source.stock["text_config"]["model_type"]
    linear = source.stock.get("projector_hidden_act") == "linear"
    if layout == "hf":
        why_not = unsupported_by_stock(vision)
        yield (
            "transformers: yes" if why_not is None else f"transformers: it loads the weights and cannot run: {why_not}"
        )
        if not family.served:
            yield f"vLLM: no, its LLaVA knows CLIP, SigLIP and Pixtral towers, and this one is a {tower}"
        elif linear:
            yield "vLLM: no, it knows no linear projector"
        elif language not in ARCHITECTURES:
            yield f"vLLM: not tried with a language model of type {language}; its LLaVA takes those that vLLM has"
        else:
            yield 'vLLM: yes; --mm-processor-kwargs \'{"backend": "pil"}\' lets it resize pictures as training did'
        yield "SGLang and the authors' code: no, export with --format original"
        return
    if not family.authors:
        yield f"the authors' code (llava): no, its tower is a {tower}"
    elif source.image_mode == "squash":
        yield "the authors' code (llava): no, it crops the centre of images for CLIP, and this model saw whole images"
    else:
        yield "the authors' code (llava): yes"
    if not family.served:
        yield f"SGLang: no, it knows CLIP and SigLIP towers, and this one is a {tower}"
    elif linear:
        yield "SGLang: no, it knows projectors of two layers"
    else:
        yield "SGLang: yes; it takes the tower's config from `mm_vision_tower`, whose name must say clip or siglip"
    yield "transformers and vLLM: no, export with --format hf"


def _name(source: Source) -> str:
    if source.config is None:
        return source.place.name
    model = source.config.model
    return f"{source.config.name}: {model.language_model.name} with {model.vision_tower.name}"


def _recipe(config: RunConfig) -> Iterator[tuple[str, Any]]:
    stage = config.stage
    if config.recipe:
        yield "source of the numbers", config.recipe
    yield "language model", config.model.language_model.name
    yield "vision tower", f"{config.model.vision_tower.name}, layer {config.model.vision_tower.feature_layer}"
    yield "projector", config.model.projector
    yield "grids (rows, columns)", ", ".join(f"{rows}x{columns}" for rows, columns in config.model.grids)
    yield "stage", stage.name
    yield "started from", stage.init_from or "fresh parts"
    for part, rate in stage.rates.items():
        yield f"learning rate of {part}", f"{rate:g}"
    for part, lora in (config.lora or {}).items():
        layers = ", ".join(lora.targets)
        yield f"adapters of {part} (LoRA, merged)", f"rank {lora.rank}, alpha {lora.alpha:g}, in {layers}"
    for key in ("batch_size", "epochs", "max_length", "template", "image_mode", "schedule", "warmup_ratio"):
        value = getattr(stage, key)
        yield key, config.model.language_model.template if key == "template" and value is None else value
    for key in ("weight_decay", "clip_norm", "loss_weighting"):
        yield key, getattr(stage, key)
    yield "seed", config.seed


def _data(about: dict[str, Any] | None) -> Iterator[str]:
    if about is None:
        yield "What it was trained on is not known here: the run's data.json was not found."
        return
    yield f"Mixture fingerprint `{about['mixture_fingerprint']}`, data fingerprint `{about['data_fingerprint']}`;"
    counts = {"samples": "num_samples", "supervised tokens": "num_supervised", "tiles": "num_tiles"}
    yield ", ".join(f"{about[key]:,} {what}" for what, key in counts.items()) + "."
    yield ""
    rows = [(row["source"], f"{row['used']:,}", _licence(row.get("licence"))) for row in about["mixture"]]
    yield from _table(("source", "samples", "licence"), rows)
    yield ""
    yield "The licences of the language model and of the vision tower hold besides; their folders name them."


def _licence(text: str | None) -> str:
    return " ".join((text or "not stated").split()).replace("|", "\\|")


def _table(head: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(str(cell) for cell in row)} |"
