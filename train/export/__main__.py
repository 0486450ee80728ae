"""`python -m train.export RUN|CHECKPOINT|HF_DIR`: exports a model to a directory for other programs.

It reads checkpoints of any ZeRO stage and number of ranks on one host without a GPU, one shard at a time. The directory
is complete and verified, or absent.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from data_recipes.schema.arguments import ArgumentParser, output_folder, positive_size, text_argument
from data_recipes.schema.console import run_program
from llava_next.config import ModelError
from llava_next.formats.atomic import atomic_directory
from llava_next.formats.original import original_tensors, write_original_folder
from llava_next.model_directory import is_hub_snapshot, model_argument
from train.checkpoint.saver import SaveFormatError
from train.config.exit_codes import report_mistake
from train.config.schema import ConfigError
from train.distributed.quiet_libraries import quiet_libraries
from train.export.export_card import describe_servers, make_card
from train.export.exported_model import ExportedModel, open_model
from train.export.push import check_may_push, push
from train.export.verify import verify_logits, verify_tensors
from train.observability.suite_results import read_suite_results

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "keep": None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code."""
    options = _parse(arguments)
    quiet_libraries(on_cpu=True)
    started = time.monotonic()
    try:
        source = open_model(options.source, _DTYPES[options.dtype], verify=not options.no_verify)
        out = options.out or _get_default_out(source, options.format)
        _check_out(out, source)
        if options.push:
            check_may_push(options.push, public=options.public)
        checks = export(source, out, options)
        address = push(out, options.push, public=options.public) if options.push else None
    except (ConfigError, ModelError, SaveFormatError, OSError) as error:
        return report_mistake(error)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"wrote {out} ({size / 2**30:.2f} GiB, {time.monotonic() - started:.0f} s) from {source.description}")
    for line in (*checks, *describe_servers(source, options.format)):
        print(f"  {line}")
    if address:
        print(f"pushed it to {address} ({'public' if options.public else 'private'})")
    return 0


def export(source: ExportedModel, out: Path, options: argparse.Namespace) -> list[str]:
    """Writes and verifies the directory.

    Returns:
        Sentences that say what was verified.

    Raises:
        ConfigError, ModelError: the model cannot be written in that format, or the export differs from its source.
    """
    shard_bytes = int(options.shard_gb * 10**9)
    checks = list(source.checks)
    with atomic_directory(out) as folder:
        assert folder is not None
        if options.format == "hf":
            source.write_hf(folder, shard_bytes)
            written = source.tensors
        else:
            model = source.to_original(options.vision_tower)
            tensors = source.single_layer_tensors()
            write_original_folder(tensors, model, folder, shard_bytes)
            written = original_tensors(tensors, model)
        if options.no_verify:
            checks.append("NOT verified (--no-verify): neither the source's files nor the written ones were checked")
        else:
            checks.append(verify_tensors(folder, written))
            if options.format == "hf":
                checks.append(verify_logits(folder, source))
            else:
                checks.append("logits NOT compared: this needs the authors' code, in a separate environment")
        source.write_data_summary(folder)
        suites = read_suite_results(source.path.parent, checks) if source.is_of_run else []
        (folder / "README.md").write_text(make_card(source, options.format, checks, suites, licence=options.licence))
    return checks


def _get_default_out(source: ExportedModel, layout: str) -> Path:
    if is_hub_snapshot(source.path):
        raise ConfigError(f"{source.path} is in the hub's cache, which is not written to; name a folder with --out")
    if source.path.parent.name == "checkpoints":
        return source.path.parent.parent / "exports" / f"{source.path.name}_{layout}"
    return source.path.with_name(f"{source.path.name}_{layout}")


def _check_out(out: Path, source: ExportedModel) -> None:
    path = source.path.resolve()
    if out.resolve() in (path, *path.parents):
        raise ConfigError(f"--out {out} is or contains the exported source; choose another folder")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file())):
        raise ConfigError(
            f"--out {out} exists and is not a model directory, so it is not replaced; choose another folder"
        )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.export", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=model_argument, help="a run (its export/, or its newest checkpoint), a "
                        "checkpoint (RUN/checkpoints/step_000500), a Hugging Face directory, or the id of a fetched "
                        "one on the hub, with --out")  # fmt: skip
    parser.add_argument("--format", choices=("hf", "original"), default="hf", help="hf: for transformers and vLLM; "
                        "original: for SGLang and the authors' code")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="keep", help="dtype of the weights; keep: as is. "
                        "fp32 reads the optimizer's fp32 copies of a bf16 run")  # fmt: skip
    parser.add_argument("--out", type=output_folder, help="the directory to write (default: RUN/exports/STEP_FORMAT)")
    parser.add_argument(
        "--shard-gb", type=positive_size, default=4.0, help="maximum size of a file in GB, which bounds the memory use"
    )
    parser.add_argument("--vision-tower", type=text_argument, help="with --format original: the tower's directory or "
                        "hub name, from which servers read its config (default: that of the run)")  # fmt: skip
    parser.add_argument("--push", type=text_argument, metavar="ORG/NAME", help="also upload the directory to this "
                        "repository of the hub, which is made, private, if there is none")  # fmt: skip
    parser.add_argument("--public", action="store_true", help="with --push: everybody can see the repository")
    parser.add_argument("--licence", type=text_argument, help="the model's licence in its card, by the hub's name, "
                        "such as apache-2.0 (default: none is stated)")  # fmt: skip
    parser.add_argument("--no-verify", action="store_true", help="do not verify the files that are read and written")
    options = parser.parse_args(arguments)
    if options.public and not options.push:
        parser.error("--public needs --push ORG/NAME")
    return options


if __name__ == "__main__":
    sys.exit(run_program(main))
