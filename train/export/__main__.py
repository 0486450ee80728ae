"""`python -m train.export RUN|CHECKPOINT|HF_DIR`: a model as a directory that others load.

From a checkpoint of any ZeRO stage and number of ranks, on one host without a GPU, a shard at a time. The directory is
complete and verified, or absent.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from llava_next.config import ModelError
from llava_next.formats.atomic import complete_or_absent
from llava_next.formats.original import original_tensors, write_original_folder
from train.checkpoint.saver import SaveFormatError
from train.config.exit_codes import report_mistake
from train.config.schema import ConfigError
from train.distributed.quiet_libraries import quiet_libraries
from train.export.export_card import card, servers
from train.export.exported_model import Source, open_source
from train.export.verify import verify_logits, verify_tensors

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "keep": None}


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    options = _parse(arguments)
    quiet_libraries(on_cpu=True)
    started = time.monotonic()
    try:
        source = open_source(options.source, _DTYPES[options.dtype], verify=not options.no_verify)
        out = options.out or _default_out(source, options.format)
        _check_out(out, source)
        checks = export(source, out, options)
    except (ConfigError, ModelError, SaveFormatError) as error:
        return report_mistake(error)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"wrote {out} ({size / 2**30:.2f} GiB, {time.monotonic() - started:.0f} s) from {source.words}")
    for line in (*checks, *servers(source, options.format)):
        print(f"  {line}")
    return 0


def export(source: Source, out: Path, options: argparse.Namespace) -> list[str]:
    """Writes and verifies the directory; returns what was verified, in sentences.

    Raises:
        ConfigError, ModelError: what cannot be written in that format; an export that is not its source.
    """
    shard_bytes = int(options.shard_gb * 10**9)
    checks = list(source.checks)
    with complete_or_absent(out) as folder:
        assert folder is not None
        if options.format == "hf":
            source.write_hf(folder, shard_bytes)
            written = source.tensors
        else:
            model = source.original(options.vision_tower)
            tensors = source.single_layer_tensors()
            write_original_folder(tensors, model, folder, shard_bytes)
            written = original_tensors(tensors, model)
        if options.no_verify:
            checks.append("NOT verified (--no-verify): neither the files that were read nor those that were written")
        else:
            checks.append(verify_tensors(folder, written))
            if options.format == "hf":
                checks.append(verify_logits(folder, source))
            else:
                checks.append("logits NOT compared: that takes the authors' code, in an environment of its own")
        source.copy_about(folder)
        (folder / "README.md").write_text(card(source, options.format, checks))
    return checks


def _default_out(source: Source, layout: str) -> Path:
    if source.place.parent.name == "checkpoints":
        return source.place.parent.parent / "exports" / f"{source.place.name}_{layout}"
    return source.place.with_name(f"{source.place.name}_{layout}")


def _check_out(out: Path, source: Source) -> None:
    place = source.place.resolve()
    if out.resolve() in (place, *place.parents):
        raise ConfigError(f"--out {out} is, or holds, what is exported; name another folder")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file())):
        raise ConfigError(f"--out {out} is there and is no model's directory, which alone is replaced; name another")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.export", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path, help="a run (its export/, else its newest checkpoint), a checkpoint "
                        "(RUN/checkpoints/step_000500), or a Hugging Face directory")  # fmt: skip
    parser.add_argument("--format", choices=("hf", "original"), default="hf", help="hf: for transformers and vLLM; "
                        "original: the authors' names, for SGLang and their code")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="keep", help="of the weights; keep: as they are. "
                        "fp32 takes the optimizer's own copies of a bf16 run")  # fmt: skip
    parser.add_argument("--out", type=Path, help="the directory to write (default: RUN/exports/STEP_FORMAT)")
    parser.add_argument("--shard-gb", type=float, default=4.0, help="size of a file, and of what is held in memory")
    parser.add_argument("--vision-tower", help="of --format original: the tower's directory or name on the hub, where "
                        "servers find its config (default: the run's own)")  # fmt: skip
    parser.add_argument("--no-verify", action="store_true", help="neither compare a checkpoint's files with their "
                        "sums, nor read back what was written")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
