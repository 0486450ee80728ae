"""From raw files to a store: how fast against reading the bytes alone, and whether memory stays flat.

    python scripts/bench/prepare.py [--parts rate memory] [--pictures 300] [--records 10000 100000 1000000]

*rate*: LLaVA JSON with photographs of 0.3 and of 2 megapixels through `data_recipes.prepare`, beside reading the same
files and beside decoding them. Rates are samples per processor second (one core, busy with nothing else), so other
programs on the machine have little say in them; wall-clock rates stand beside them. *memory*: so many simulated
records, each with a picture of its own and one in fifty bad, through `prepare` and then as a mixture with held-out
samples; the most that was resident in any process, and for the mixture the most of its own. Needs the quickstart's
assets: `python scripts/quickstart/assets.py`. Results: scripts/bench/results/prepare.json.
"""

import argparse
import io
import json
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from results import machine_facts, memory_mib, save, table

from data_recipes.mixture.mixture import Mixture
from data_recipes.prepare.__main__ import main as prepare
from data_recipes.raw.image_files import load
from data_recipes.raw.json_records import iter_records
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import Message, Reject, Sample

ASSETS = Path("~/.cache/llava_next").expanduser()
SIZES_HW = {"0.3 MP": (480, 640), "2 MP": (1224, 1632)}
GOAL_FLAT_MIB = 64.0  # more from the fewest to the most records, in any process of `prepare`

Result = dict[str, Any]


def run_prepare(root: Path, workers: int, stores: str) -> Result:
    """`prepare` of the source `bench` below `root`; seconds of the processor and of the clock."""
    line = ["--source", "bench", "--workers", workers, "--raw", root / "raw", "--stores", root / stores]
    before, began = cpu_seconds(), time.perf_counter()
    with redirect_stdout(io.StringIO()):
        code = prepare([str(word) for word in [*line, "--configs", root / "configs"]])
    if code != 0:
        raise RuntimeError(f"prepare ended with {code}")
    return {"cpu_s": cpu_seconds() - before, "wall_s": time.perf_counter() - began}


def cpu_seconds() -> float:
    """Processor seconds of this process and of its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


# ---------------------------------------------------------------------------------------------------- rate


def write_photographs(root: Path, height: int, width: int, num_pictures: int) -> list[Path]:
    """LLaVA JSON of `num_pictures` records, each on a crop of a real photograph, and the source's YAML."""
    names = [
        *sorted(ASSETS.glob("sklearn/*.jpg")),
        *(ASSETS / "skimage/photos" / n for n in ("coffee.png", "rocket.jpg")),
    ]
    photographs = [Image.open(path).convert("RGB") for path in names]
    random, records, paths = np.random.default_rng(0), [], []
    folder = root / "raw" / "bench" / "images"
    folder.mkdir(parents=True)
    for number in range(num_pictures):
        photograph = photographs[number % len(photographs)]
        left, top = (int(random.integers(0, side // 4)) for side in photograph.size)
        crop = photograph.crop((left, top, left + photograph.width * 3 // 4, top + photograph.height * 3 // 4))
        paths.append(folder / f"{number:06d}.jpg")
        crop.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1], "JPEG", quality=90)
        turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "A place. " * 30}]
        records.append({"id": f"{number:09d}", "image": paths[-1].name, "conversations": turns})
    (root / "raw" / "bench" / "bench.json").write_text(json.dumps(records))
    put_source(root, "reader: llava_json\noptions: {annotations: bench.json, image_root: images}\n")
    return paths


def put_source(root: Path, text: str) -> None:
    """The YAML of the source `bench`."""
    (root / "configs" / "source").mkdir(parents=True)
    (root / "configs" / "source" / "bench.yaml").write_text(f"{text}root: bench\nmax_reject_share: 1.0\n")


def measure_rate(num_pictures: int, rounds: int = 3) -> Result:
    """Samples per second, the best of three rounds; the files are in the page cache for everyone."""
    found: Result = {}
    for size, (height, width) in SIZES_HW.items():
        with TemporaryDirectory() as folder:
            root = Path(folder)
            paths = write_photographs(root, height, width, num_pictures)
            jobs: dict[str, Callable[[int], Result]] = {
                "read": partial(timed, Path.read_bytes, paths),
                "decode": partial(timed, decode, paths),
                "check": partial(timed, load, paths),
                "prepare, 1 process": lambda n, root=root: run_prepare(root, 1, f"one_{n}"),  # type: ignore[misc]
                "prepare, 2 processes": lambda n, root=root: run_prepare(root, 2, f"two_{n}"),  # type: ignore[misc]
            }
            results = {name: [job(number) for number in range(rounds)] for name, job in jobs.items()}
            found[size] = {
                "kib_a_picture": sum(path.stat().st_size for path in paths) / num_pictures / 1024,
                "rows": {
                    name: {
                        "samples_per_cpu_s": num_pictures / min(r["cpu_s"] for r in each),
                        "samples_per_s": num_pictures / min(r["wall_s"] for r in each),
                    }
                    for name, each in results.items()
                },
            }
    return found


def timed(job: Callable[[Path], object], paths: list[Path], _: int) -> Result:
    """Processor and clock seconds of `job` on every file; the mean of as many times as take half a second."""
    before, began, times = cpu_seconds(), time.perf_counter(), 0
    while times == 0 or time.perf_counter() - began < 0.5:
        for path in paths:
            job(path)
        times += 1
    return {"cpu_s": (cpu_seconds() - before) / times, "wall_s": (time.perf_counter() - began) / times}


def decode(path: Path) -> None:
    """What no check of a picture can do without."""
    Image.open(io.BytesIO(path.read_bytes())).load()


def show_rate(found: Result) -> str:
    """Samples a second and core, and what one takes beside reading it."""
    rows = []
    for size, result in found.items():
        reading = 1 / result["rows"]["read"]["samples_per_cpu_s"]
        for name, row in result["rows"].items():
            each = 1 / row["samples_per_cpu_s"]
            rates = (f"{row['samples_per_cpu_s']:,.0f}", f"{row['samples_per_s']:,.0f}")
            rows.append([f"{size}, {name}", *rates, f"{1000 * each:.2f}", f"{each / reading:,.0f}x"])
        rows.append([f"{size}: {result['kib_a_picture']:.0f} KiB a picture", "", "", "", ""])
    return table(["rate", "samples/s/core", "samples/s", "ms a sample", "of reading"], rows)


# -------------------------------------------------------------------------------------------------- memory


def samples(root: Path) -> Iterator[Sample | Reject]:
    """The simulated source's reader: each record gets a picture of its own; one in fifty is cut off."""
    for place, record in iter_records(root / "records.json"):
        number = record["id"]
        data = tiny_png(number)
        data = data[:-30] if number % 50 == 49 else data
        messages = (Message("user", record["question"]), Message("assistant", record["answer"]))
        yield Sample(str(number), messages, (data,), place)


def tiny_png(number: int) -> bytes:
    """An 8 x 8 PNG whose pixels are the number."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = b"".join(b"\0" + struct.pack(">QQQ", number, number * 31, number * 101) for _ in range(8))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels, 1)) + chunk(b"IEND", b"")


def write_records(root: Path, num_records: int) -> None:
    """One JSON list, written record by record, 700 characters each."""
    (root / "raw" / "bench").mkdir(parents=True)
    with (root / "raw" / "bench" / "records.json").open("w") as stream:
        for number in range(num_records):
            record = {"id": number, "question": "<image>\nWhat?", "answer": f"{number} is what it is. " * 30}
            stream.write(("[" if number == 0 else ",\n") + json.dumps(record))
        stream.write("]")
    (root / "simulated").mkdir()
    (root / "simulated" / "records.py").write_text("from prepare import samples\n")  # this file: a script's neighbour
    put_source(root, "reader: simulated.records\n")


def prepare_alone(root: Path, _: int) -> Result:
    """`prepare` in this process and two workers, and the most that was resident in each."""
    sys.path.append(str(root))
    before = memory_mib("VmRSS")
    found = run_prepare(root, 2, "stores")
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return found | {"start_mib": before, "program_mib": memory_mib("VmHWM"), "worker_mib": workers}


def mixture_alone(root: Path, num_records: int) -> Result:
    """The same records as a mixture: half of them, 512 held out."""
    config = MixtureConfig("bench", 0, {"bench": SourceShare(num_records // 2, holdout=512)})
    with highest_of_its_own() as memory:
        began = time.process_time()
        Mixture.open(config, root / "stores")
        seconds = time.process_time() - began
    return {"mixture_s": seconds, "mixture_mib": max(memory) - memory[0]}


@contextmanager
def highest_of_its_own() -> Iterator[list[float]]:
    """MiB of this process's own memory, a hundred times a second; pages of mapped files are the system's to take."""
    memory, is_over = [memory_mib("RssAnon")], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.01):
            memory.append(memory_mib("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield memory
    is_over.set()
    watcher.join()


ALONE: dict[str, Callable[[Path, int], Result]] = {"prepare": prepare_alone, "mixture": mixture_alone}


def in_own_process(part: str, root: Path, num_records: int) -> Result:
    """Runs one measurement alone, so that its memory is its own; it prints its result as JSON."""
    command = [sys.executable, __file__, "--alone", part, str(root), str(num_records)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_memory(counts: list[int]) -> Result:
    """Both measurements for each number of records."""
    found: Result = {}
    for num_records in counts:
        with TemporaryDirectory() as folder:
            root = Path(folder)
            write_records(root, num_records)
            alone = [in_own_process(part, root, num_records) for part in ALONE]
            found[str(num_records)] = alone[0] | alone[1]
    return found


def show_memory(found: Result) -> str:
    """The most that was resident, by number of records."""
    rows = [
        [
            f"{int(number):,}",
            f"{row['start_mib']:.0f}",
            f"{row['program_mib']:.0f}",
            f"{row['worker_mib']:.0f}",
            f"{int(number) / row['cpu_s']:,.0f}",
            f"{row['mixture_mib']:.0f}",
            f"{row['mixture_s']:.1f}",
        ]
        for number, row in found.items()
    ]
    head = ["records", "MiB at start", "MiB prepare", "MiB a worker", "records/s/core", "MiB mixture", "s mixture"]
    return table(head, rows)


def goals_missed(found: Result) -> list[str]:
    """Memory that grows with the number of records."""
    rows = list(found.get("memory", {}).values())
    grown = {key: rows[-1][key] - rows[0][key] for key in ("program_mib", "worker_mib") if len(rows) > 1}
    return [f"{key} grew by {more:.0f} MiB" for key, more in grown.items() if more > GOAL_FLAT_MIB]


def main() -> int:
    """The program; returns 1 if memory grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("rate", "memory"), default=["rate", "memory"])
    parser.add_argument("--pictures", type=int, default=300, help="of each size, in the part rate")
    parser.add_argument(
        "--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of the part memory"
    )
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        part, root, num_records = args.alone
        print(json.dumps(ALONE[part](Path(root), int(num_records))))
        return 0
    found: Result = {}
    if "rate" in args.parts:
        found["rate"] = measure_rate(args.pictures)
        print(show_rate(found["rate"]), flush=True)
    if "memory" in args.parts:
        found["memory"] = measure_memory(args.records)
        print(show_memory(found["memory"]), flush=True)
    save("prepare", ["python", "scripts/bench/prepare.py", *sys.argv[1:]], machine_facts(), found)
    missed = goals_missed(found)
    print("\n".join(missed or ["memory is flat"]))
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
