"""From raw files to a store: the rate against reading the bytes alone, and memory by the number of records.

    python scripts/bench/input.py stores [--parts rate memory] [--pictures 300] [--records 10000 100000 1000000]

*rate*: LLaVA JSON with photographs of 0.3 and of 2 megapixels through `data_recipes.prepare`, against reading and
against decoding the same files. Rates are samples per processor second, which other programs influence little; wall
rates stand beside them. *memory*: simulated records, each with an image of its own and one in fifty damaged, through
`prepare` and then as a mixture with held-out samples; peak resident memory of every process, and of the mixture's own
memory. Needs the quickstart's assets: `python scripts/quickstart/assets.py`. Results:
scripts/bench/results/prepare.json.
"""

import argparse
import io
import json
import resource
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from measuring.processes import cpu_seconds, memory_mib, run_alone
from measuring.result_files import RESULTS, columns_table, save, table
from PIL import Image

from data_recipes.mixture.mixture import Mixture
from data_recipes.prepare.__main__ import main as prepare
from data_recipes.raw.image_files import load_image
from data_recipes.raw.json_records import iter_records
from data_recipes.schema.arguments import ArgumentParser
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import Message, Reject, Sample

PROGRAM = "input.py stores"
SIZES_HW = {"0.3 MP": (480, 640), "2 MP": (1224, 1632)}
GOAL_FLAT_MIB = 64.0
"""Growth from the smallest to the largest number of records, in any process of `prepare`."""

Result = dict[str, Any]


def run_prepare(root: Path, workers: int, stores: str) -> Result:
    """Prepares the source `bench` below `root`; returns processor seconds and wall seconds."""
    arguments = ["--source", "bench", "--workers", workers, "--raw", root / "raw", "--stores", root / stores]
    before, began = cpu_seconds(), time.perf_counter()
    with redirect_stdout(io.StringIO()):
        code = prepare([str(word) for word in [*arguments, "--configs", root / "configs"]])
    if code != 0:
        raise RuntimeError(f"prepare ended with exit code {code}")
    return {"cpu_s": cpu_seconds() - before, "wall_s": time.perf_counter() - began}


# ---------------------------------------------------------------------------------------------------- rate


def write_photographs(root: Path, height: int, width: int, num_images: int) -> list[Path]:
    """Writes LLaVA JSON, each record with a crop of a photograph, and the source's YAML; returns the image files."""
    from input_path.real_images import photographs  # brings torch, which the part `memory` must not hold

    photos = photographs()
    random, records, paths = np.random.default_rng(0), [], []
    folder = root / "raw" / "bench" / "images"
    folder.mkdir(parents=True)
    for number in range(num_images):
        photograph = photos[number % len(photos)]
        left, top = (int(random.integers(0, side // 4)) for side in photograph.size)
        crop = photograph.crop((left, top, left + photograph.width * 3 // 4, top + photograph.height * 3 // 4))
        paths.append(folder / f"{number:06d}.jpg")
        crop.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1], "JPEG", quality=90)
        turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "A place. " * 30}]
        records.append({"id": f"{number:09d}", "image": paths[-1].name, "conversations": turns})
    (root / "raw" / "bench" / "bench.json").write_text(json.dumps(records))
    write_source(root, "reader: llava_json\noptions: {annotations: bench.json, image_root: images}\n")
    return paths


def write_source(root: Path, text: str) -> None:
    """Writes the YAML of the source `bench`."""
    (root / "configs" / "source").mkdir(parents=True)
    (root / "configs" / "source" / "bench.yaml").write_text(f"{text}root: bench\nmax_reject_share: 1.0\n")


def measure_rate(num_images: int, rounds: int = 3) -> Result:
    """Samples per second, the best of the rounds, with all files in the page cache."""
    results: Result = {}
    for size, (height, width) in SIZES_HW.items():
        with TemporaryDirectory() as folder:
            root = Path(folder)
            paths = write_photographs(root, height, width, num_images)
            jobs: dict[str, Callable[[int], Result]] = {
                "read": partial(timed, Path.read_bytes, paths),
                "decode": partial(timed, decode, paths),
                "check": partial(timed, load_image, paths),
                "prepare, 1 process": lambda n, root=root: run_prepare(root, 1, f"one_{n}"),  # type: ignore[misc]
                "prepare, 2 processes": lambda n, root=root: run_prepare(root, 2, f"two_{n}"),  # type: ignore[misc]
            }
            times = {name: [job(number) for number in range(rounds)] for name, job in jobs.items()}
            results[size] = {
                "kib_a_picture": sum(path.stat().st_size for path in paths) / num_images / 1024,
                "rows": {
                    name: {
                        "samples_per_cpu_s": num_images / min(r["cpu_s"] for r in each),
                        "samples_per_s": num_images / min(r["wall_s"] for r in each),
                    }
                    for name, each in times.items()
                },
            }
    return results


def timed(job: Callable[[Path], object], paths: list[Path], _: int) -> Result:
    """Processor and wall seconds of `job` on every file; the mean of as many repetitions as take half a second."""
    before, began, times = cpu_seconds(), time.perf_counter(), 0
    while times == 0 or time.perf_counter() - began < 0.5:
        for path in paths:
            job(path)
        times += 1
    return {"cpu_s": (cpu_seconds() - before) / times, "wall_s": (time.perf_counter() - began) / times}


def decode(path: Path) -> None:
    """Decodes an image, which every check of it must do."""
    Image.open(io.BytesIO(path.read_bytes())).load()


def rate_table(results: Result) -> str:
    """Samples per second and core, and their time relative to reading."""
    rows = []
    for size, result in results.items():
        reading = 1 / result["rows"]["read"]["samples_per_cpu_s"]
        for name, row in result["rows"].items():
            each = 1 / row["samples_per_cpu_s"]
            rates = (f"{row['samples_per_cpu_s']:,.0f}", f"{row['samples_per_s']:,.0f}")
            rows.append([f"{size}, {name}", *rates, f"{1000 * each:.2f}", f"{each / reading:,.0f}x"])
        rows.append([f"{size}: {result['kib_a_picture']:.0f} KiB an image", "", "", "", ""])
    return table(["rate", "samples/s/core", "samples/s", "ms a sample", "of reading"], rows)


# -------------------------------------------------------------------------------------------------- memory


def samples(root: Path) -> Iterator[Sample | Reject]:
    """The reader of the simulated source: each record has an image of its own, one in fifty of which is cut off."""
    for position, record in iter_records(root / "records.json"):
        number = record["id"]
        data = tiny_png(number)
        data = data[:-30] if number % 50 == 49 else data
        messages = (Message("user", record["question"]), Message("assistant", record["answer"]))
        yield Sample(str(number), messages, (data,), position)


def tiny_png(number: int) -> bytes:
    """An 8 x 8 PNG whose pixels are made of the number."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = b"".join(b"\0" + struct.pack(">QQQ", number, number * 31, number * 101) for _ in range(8))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels, 1)) + chunk(b"IEND", b"")


def write_records(root: Path, num_records: int) -> None:
    """Writes one JSON list, record by record, of 700 characters each, its reader and the source's YAML."""
    (root / "raw" / "bench").mkdir(parents=True)
    with (root / "raw" / "bench" / "records.json").open("w") as stream:
        for number in range(num_records):
            record = {"id": number, "question": "<image>\nWhat?", "answer": f"{number} is what it is. " * 30}
            stream.write(("[" if number == 0 else ",\n") + json.dumps(record))
        stream.write("]")
    (root / "simulated").mkdir()
    (root / "simulated" / "records.py").write_text("from input_path.stores import samples\n")
    write_source(root, "reader: simulated.records\n")


def prepare_alone(root: Path, _: int) -> Result:
    """Runs `prepare` in this process with two workers; returns the peak memory of each."""
    sys.path.append(str(root))
    before = memory_mib("VmRSS")
    times = run_prepare(root, 2, "stores")
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return times | {"start_mib": before, "program_mib": memory_mib("VmHWM"), "worker_mib": workers}


def mixture_alone(root: Path, num_records: int) -> Result:
    """Opens the same records as a mixture: half of them, and 512 held out."""
    config = MixtureConfig("bench", 0, {"bench": SourceShare(num_records // 2, holdout=512)})
    with own_memory_sampled() as memory:
        began = time.process_time()
        Mixture.open(config, root / "stores")
        seconds = time.process_time() - began
    return {"mixture_s": seconds, "mixture_mib": max(memory) - memory[0]}


@contextmanager
def own_memory_sampled() -> Iterator[list[float]]:
    """MiB of this process's anonymous memory, a hundred times a second. The system can drop pages of mapped files."""
    memory, is_over = [memory_mib("RssAnon")], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.01):
            memory.append(memory_mib("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield memory
    is_over.set()
    watcher.join()


MEASURED_ALONE: dict[str, Callable[[Path, int], Result]] = {"prepare": prepare_alone, "mixture": mixture_alone}


def measure_memory(counts: list[int]) -> Result:
    """Both measurements for each number of records."""
    results: Result = {}
    for num_records in counts:
        with TemporaryDirectory() as folder:
            root = Path(folder)
            write_records(root, num_records)
            prepared, opened = (run_alone(PROGRAM, part, root, num_records) for part in MEASURED_ALONE)
            results[str(num_records)] = prepared | opened
    return results


def memory_table(results: Result) -> str:
    """Peak memory by number of records."""
    columns = (
        ("start_mib", "MiB at start", ".0f"),
        ("program_mib", "MiB prepare", ".0f"),
        ("worker_mib", "MiB a worker", ".0f"),
        ("rate", "records/s/core", ",.0f"),
        ("mixture_mib", "MiB mixture", ".0f"),
        ("mixture_s", "s mixture", ".1f"),
    )
    rows = {f"{int(number):,}": row | {"rate": int(number) / row["cpu_s"]} for number, row in results.items()}
    return columns_table(columns, rows, "records")


def missed_goals(results: Result) -> list[str]:
    """One sentence for every kind of memory that grows with the number of records."""
    rows = list(results.get("memory", {}).values())
    grown = {key: rows[-1][key] - rows[0][key] for key in ("program_mib", "worker_mib") if len(rows) > 1}
    return [f"{key} grew by {more:.0f} MiB" for key, more in grown.items() if more > GOAL_FLAT_MIB]


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns 1 if memory grows."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser(PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("rate", "memory"), default=["rate", "memory"])
    parser.add_argument("--pictures", type=int, default=300, help="images of each size, in the part rate")
    parser.add_argument(
        "--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of the part memory"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.alone:
        part, root, num_records = options.alone
        print(json.dumps(MEASURED_ALONE[part](Path(root), int(num_records))))
        return 0
    results: Result = {}
    if "rate" in options.parts:
        results["rate"] = measure_rate(options.pictures)
        print(rate_table(results["rate"]), flush=True)
    if "memory" in options.parts:
        results["memory"] = measure_memory(options.records)
        print(memory_table(results["memory"]), flush=True)
    save("prepare", PROGRAM, words, results, options.out)
    missed = missed_goals(results)
    print("\n".join(missed or ["memory does not grow with the number of records"]))
    return int(bool(missed))
