"""Writes the model card of an export (README.md) from the run's configuration and data.json."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from tabulate import tabulate
from transformers import AutoConfig

from data_recipes.schema.config_dir import CONFIG_DIR
from data_recipes.schema.downloads import HubDownload
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import read_source
from llava_next.config import TemplateConfig
from llava_next.formats.onevision import ONEVISION_SERVING
from llava_next.model.checkpoint_config import ARCHITECTURES
from llava_next.model.towers import TOWER_FAMILIES, stock_unsupported_reason
from llava_next.model_directory import find_hub_id
from train.config.schema import RunConfig
from train.distributed.versions import versions
from train.export.exported_model import ExportedModel
from train.observability.suite_results import SUITE_HEAD, suite_rows


def make_card(
    source: ExportedModel,
    layout: str,
    checks: Sequence[str],
    suites: Sequence[dict[str, Any]] = (),
    licence: str | None = None,
) -> str:
    """Returns the model card as Markdown.

    Args:
        layout: hf or original.
        checks: sentences that say what was verified and what was not.
        suites: results tables of these weights (`read_suite_results`).
        licence: the hub's name of the model's licence.
    """
    lines = ["---", card_metadata(source, suites, licence), "---", ""]
    lines += [f"# {_get_name(source)}", ""]
    lines += [f"Exported from {source.description}.", ""]
    lines += ["## Supported software", "", *(f"- {line}" for line in describe_servers(source, layout)), ""]
    if source.config is not None:
        lines += ["## Recipe", "", _format_table(("key", "value"), _list_recipe(source.config)), ""]
    for results in suites:
        lines += [f"## Results: {results['title']}", "", *_describe_suite(results), ""]
    lines += ["## Data", "", *_describe_data(source.data_summary), ""]
    lines += ["## Checks at export", "", *(f"- {check}" for check in checks), ""]
    all_versions = {f"trained with {key}": value for key, value in source.versions.items()}
    all_versions |= {f"exported with {key}": value for key, value in versions().items()}
    lines += ["## Versions", "", _format_table(("what", "version"), all_versions.items())]
    return "\n".join(lines) + "\n"


def describe_servers(source: ExportedModel, layout: str) -> Iterator[str]:
    """Yields sentences that say which software supports the export."""
    vision = AutoConfig.for_model(**source.stock_config["vision_config"])
    tower, family = vision.model_type, TOWER_FAMILIES[vision.model_type]
    language = source.stock_config["text_config"]["model_type"]
    linear = source.stock_config.get("projector_hidden_act") == "linear"
    if layout == "hf":
        reason = stock_unsupported_reason(vision)
        yield "transformers: yes" if reason is None else f"transformers: loads the weights but cannot run: {reason}"
        if not family.is_served:
            yield f"vLLM: no, its LLaVA supports CLIP, SigLIP and Pixtral towers, and this model has a {tower}"
        elif linear:
            yield "vLLM: no, it does not support linear projectors"
        elif language not in ARCHITECTURES:
            yield f"vLLM: not tested with a language model of type {language}; its LLaVA supports those of vLLM"
        elif source.stock_config["model_type"] == "llava_onevision":
            yield (
                'vLLM: yes, for one image, with --limit-mm-per-prompt \'{"image": 1, "video": 0}\'; it resizes by '
                "torchvision, whose pixel values differ from training's in places"
            )
        else:
            yield 'vLLM: yes; --mm-processor-kwargs \'{"backend": "pil"}\' makes it resize images as training did'
        if source.stock_config["model_type"] == "llava_onevision":
            yield ONEVISION_SERVING
        yield "SGLang and the authors' code: no, use --format original"
        return
    if not family.is_in_authors_code:
        yield f"the authors' code (llava): no, the tower is a {tower}"
    elif source.views.single == "squash":
        yield "the authors' code (llava): no, it crops the centre of images for CLIP, and this model saw whole images"
    else:
        yield "the authors' code (llava): yes"
    if not family.is_served:
        yield f"SGLang: no, it supports CLIP and SigLIP towers, and this model has a {tower}"
    elif linear:
        yield "SGLang: no, it supports two-layer projectors only"
    else:
        yield "SGLang: yes; it reads the tower's config from `mm_vision_tower`, whose name must contain clip or siglip"
    yield "transformers and vLLM: no, use --format hf"


def card_metadata(source: ExportedModel, suites: Sequence[dict[str, Any]], licence: str | None) -> str:
    """Returns the front matter of the card as YAML: what the hub lists and searches.

    Base models and data sets are those with an id on the hub. Metrics are those of the results tables of these weights.
    """
    parts = () if source.config is None else (source.config.model.language_model, source.config.model.vision_tower)
    ids = (find_hub_id(Path(part.path)) for part in parts)
    summary = source.data_summary or {"mixture": []}
    data = (name for row in summary["mixture"] for name in _published_datasets(row["source"]))
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=column["task"],
            dataset_name=column["title"],
            metric_type=column["metrics"][index],
            metric_value=value,
        )
        for suite in suites
        for column in suite["columns"].values()
        for index, value in enumerate(column.get("values") or ())
    ]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=licence,
        base_model=list(dict.fromkeys(filter(None, ids))) or None,
        datasets=list(dict.fromkeys(data)) or None,
        tags=["llava-next"],
        eval_results=results or None,
        model_name=_get_name(source) if results else None,
    )
    return metadata.to_yaml().strip()


def _published_datasets(source: str) -> Iterator[str]:
    """Yields the ids of the hub's data sets from which a shipped source is fetched."""
    try:
        downloads = read_source(CONFIG_DIR, source).download
    except DataError:  # a source of the user's own
        return
    for entry in downloads:
        if isinstance(entry, HubDownload) and entry.hub.startswith("datasets/"):
            yield entry.hub.removeprefix("datasets/")


def _get_name(source: ExportedModel) -> str:
    if source.config is None:
        return source.path.name
    model = source.config.model
    return f"{source.config.name}: {model.language_model.name} with {model.vision_tower.name}"


def _list_recipe(config: RunConfig) -> Iterator[tuple[str, Any]]:
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
    for key in ("batch_size", "epochs", "max_length", "template", "views", "schedule", "warmup_ratio"):
        value = getattr(stage, key)
        if key == "template":
            value = value or config.model.language_model.template
            value = "custom, in the chat template" if isinstance(value, TemplateConfig) else value
        yield key, value
    for key in ("weight_decay", "betas", "eps", "clip_norm", "loss_weighting"):
        yield key, getattr(stage, key)
    yield "seed", config.seed


def _describe_suite(results: dict[str, Any]) -> Iterator[str]:
    compared = results.get("compared_with")
    yield (
        f"Measured with lmms-eval {results['lmms_eval']}"
        + (f", compared with {compared}," if compared else "")
        + (f" as published in {results['source']}." if compared else ".")
    )
    yield ""
    rows = [[cell.replace("|", "\\|") for cell in row.cells()] for row in suite_rows(results)]
    yield _format_table(SUITE_HEAD, rows)


def _describe_data(summary: dict[str, Any] | None) -> Iterator[str]:
    if summary is None:
        yield "The training data is unknown: the run's data.json was not found."
        return
    yield f"Mixture fingerprint `{summary['mixture_fingerprint']}`, data fingerprint `{summary['data_fingerprint']}`;"
    counts = {"samples": "num_samples", "supervised tokens": "num_supervised", "tiles": "num_tiles"}
    yield ", ".join(f"{summary[key]:,} {what}" for what, key in counts.items()) + "."
    yield ""
    rows = [(row["source"], f"{row['used']:,}", _format_licence(row.get("licence"))) for row in summary["mixture"]]
    yield _format_table(("source", "samples", "licence"), rows)
    yield ""
    yield "The licences of the language model and of the vision tower apply too; see their folders."


def _format_licence(text: str | None) -> str:
    return " ".join((text or "not stated").split()).replace("|", "\\|")


def _format_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return tabulate(rows, head, "github", disable_numparse=True)
