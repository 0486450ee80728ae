"""From stored bytes to batches: time and memory.

    python scripts/bench/input.py batches [--parts tiles lengths plan loader] [--pictures 64] [--samples 6000]

Four parts, each a table: *tiles*, ours against transformers' PIL processor on the same images, whose pixels must be
equal; *lengths*, the length table from image headers and text; *plan*, every step of an epoch of the published mixture
and of ten times as many samples; *loader*, batches through the loader of a run, also with 5 ms added to each read.
Seconds are processor seconds unless a row says wall, since other programs influence those less. Needs the quickstart's
assets: `python scripts/quickstart/assets.py`. Results: scripts/bench/results/input.json.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from measuring.processes import cpu_seconds, memory_mib, run_alone
from measuring.result_files import RESULTS, columns_table, save
from PIL import Image

from data_recipes.schema.arguments import ArgumentParser

PARTS = ("tiles", "lengths", "plan", "loader")
PUBLISHED = 779_278
GOAL_TILES, GOAL_PLAN_S, GOAL_PLAN_MIB = 3.0, 10.0, 500.0

PROGRAM = "input.py batches"

Result = dict[str, Any]


# --------------------------------------------------------------------------------------------------- tiles


def measure_tiles(num_images: int, rounds: int = 5) -> Result:
    """The quickest of several rounds for each image, by each path.

    A path takes all images before the next path starts, so that no path depends on the memory another has freed.
    """
    from input_path.real_images import TILE, encode_noise_images, layout_of
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    from llava_next.config import AUTHORS_GRIDS
    from llava_next.inputs.anyres import cut_tiles, decode, resized_hw

    stock = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[[rows * TILE, cols * TILE] for rows, cols in AUTHORS_GRIDS],
    )
    kinds, encoded = zip(*encode_noise_images(num_images), strict=True)
    images = [decode(data) for data in encoded]
    layouts = [layout_of((image.height, image.width)) for image in images]

    def resize(number: int) -> None:
        """The part of our work that is Pillow's: one resize to the base view, one to the grid."""
        image, grid = images[number], layouts[number].grid
        assert grid is not None
        height, width = resized_hw(layouts[number].size_hw, (grid[0] * TILE, grid[1] * TILE))
        image.resize((TILE, TILE), Image.Resampling.BICUBIC)
        image.resize((width, height), Image.Resampling.BICUBIC)

    paths: dict[str, Callable[[int], Any]] = {
        "decode": lambda number: decode(encoded[number]),
        "tiles": lambda number: cut_tiles(images[number], layouts[number], TILE),
        "resize": resize,
        "stock_decode": lambda number: Image.open(io.BytesIO(encoded[number])).convert("RGB"),
        "stock_tiles": lambda number: stock(images[number], return_tensors="np")["pixel_values"][0],
    }
    for number in range(num_images):
        check_pixels(stock, paths["tiles"](number), np.asarray(paths["stock_tiles"](number)))
    seconds = {name: np.full(num_images, np.inf) for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            for number in range(num_images):
                started = time.process_time()
                path(number)
                seconds[name][number] = min(seconds[name][number], time.process_time() - started)
    seconds["num_pictures"] = np.ones(num_images)
    seconds["num_tiles"] = np.array([layout.num_tiles for layout in layouts], dtype=np.float64)
    chosen = {kind: np.array([kind == other for other in kinds]) for kind in sorted(set(kinds), reverse=True)}
    chosen["all"] = np.ones(num_images, dtype=bool)
    return {
        kind: rates({name: float(values[of].sum()) for name, values in seconds.items()}) for kind, of in chosen.items()
    }


def rates(total: dict[str, float]) -> Result:
    """Rates and ratios by the processor seconds of one kind of images."""
    num_tiles = total["num_tiles"]
    return {
        "cpu_s": total,
        "tiles_per_core_second": num_tiles / total["tiles"],
        "stock_tiles_per_core_second": num_tiles / total["stock_tiles"],
        "ratio": total["stock_tiles"] / total["tiles"],
        "ratio_with_decode": (total["stock_tiles"] + total["stock_decode"]) / (total["tiles"] + total["decode"]),
        "pictures_decoded_per_core_second": total["num_pictures"] / total["decode"],
        "resize_share": total["resize"] / total["tiles"],
    }


def check_pixels(stock: Any, tiles: np.ndarray, pixels: np.ndarray) -> None:
    """Checks that our tiles, rescaled and normalised by the stock processor's functions, are its pixels bit for bit."""
    normalised = [
        stock.normalize(stock.rescale(tile.transpose(2, 0, 1), stock.rescale_factor), stock.image_mean, stock.image_std)
        for tile in tiles
    ]
    np.testing.assert_array_equal(np.array(normalised), pixels)


def tiles_table(results: Result) -> str:
    """One line for each kind of images."""
    rows = {kind: part | {"num_images": part["cpu_s"]["num_pictures"]} for kind, part in results.items()}
    columns = (
        ("num_images", "images", ".0f"),
        ("tiles_per_core_second", "ours", ".0f"),
        ("stock_tiles_per_core_second", "transformers", ".0f"),
        ("ratio", "times", ".2f"),
        ("ratio_with_decode", "decode included", ".2f"),
        ("resize_share", "resize's share", ".0%"),
        ("pictures_decoded_per_core_second", "images decoded/s", ".0f"),
    )
    return columns_table(columns, rows, "tiles/s and core") + "\n"


# ------------------------------------------------------------------------------------------------- lengths


def measure_lengths(num_samples: int, folder: Path) -> Result:
    """Writes the table with one and with two processes, and with one process for a quarter of the samples."""
    from input_path.real_images import plain_images, write_mixture

    write_mixture(folder, "text", num_samples, plain_images(256))
    one_process, two_processes = (run_alone(PROGRAM, "lengths", folder, num_samples, workers) for workers in (1, 2))
    quarter = run_alone(PROGRAM, "lengths", folder, num_samples // 4, 1)
    rate = num_samples / one_process["cpu_s"]
    return {
        "one_process": one_process,
        "two_processes": two_processes,
        "quarter": quarter,
        "samples_per_core_second": rate,
        "published_on_2_cores_s": PUBLISHED / (2 * rate),
        "published_on_32_cores_s": PUBLISHED / (32 * rate),
    }


def write_lengths(folder: Path, num_samples: int, num_workers: int) -> Result:
    """Writes one table in this process."""
    from input_path.real_images import open_mixture, processor

    from train.data.length_table import open_table

    mixture, ours = open_mixture(folder, "text", num_samples), processor()
    before, started, cpu = memory_mib("VmHWM"), time.monotonic(), cpu_seconds()
    target = folder / f"lengths_{num_workers}"
    table = open_table(mixture, ours, target, is_writer=True, num_workers=num_workers, show_progress=False)
    return {
        "num_samples": len(mixture.source_ids),
        "mean_tokens": float(table.rows["tokens"].mean()),
        "wall_s": time.monotonic() - started,
        "cpu_s": cpu_seconds() - cpu,
        "grown_mib": memory_mib("VmHWM") - before,
    }


def lengths_table(results: Result) -> str:
    """One line for each table that was written."""
    runs = {
        "1 process": results["one_process"],
        "2 processes": results["two_processes"],
        "1 process, a quarter of the samples": results["quarter"],
    }
    rows = {name: run | {"rate": run["num_samples"] / run["cpu_s"]} for name, run in runs.items()}
    columns = (
        ("num_samples", "samples", ",d"),
        ("rate", "samples/s and core", ",.0f"),
        ("wall_s", "wall s", ".1f"),
        ("grown_mib", "memory grew by MiB", ".0f"),
    )
    times = results["published_on_2_cores_s"], results["published_on_32_cores_s"]
    return (
        f"{columns_table(columns, rows, 'length table')}\n"
        f"779,278 samples at that rate: {times[0]:.0f} s on 2 cores, {times[1]:.0f} s on 32\n"
    )


# ---------------------------------------------------------------------------------------------------- plan


def measure_plan(folder: Path, num_ranks: int = 32) -> Result:
    """Plans every step of an epoch in one process: of the published mixture, and of ten times as many samples."""
    from input_path.real_images import write_published_rows

    results = {}
    for times in (1, 10):
        write_published_rows(folder / "rows.npy", times * PUBLISHED)
        results[f"times_{times}"] = run_alone(PROGRAM, "plan", folder / "rows.npy", num_ranks)
    return results


def plan_epoch(path: Path, num_ranks: int) -> Result:
    """Plans all steps of one rank, one after the other, as a run does. Costs are rounded ones of a 7B model."""
    from data_recipes.schema.published_mixture import SOURCES
    from llava_next.model.flops import StepCosts
    from train.config.schema import PackingConfig, StageConfig
    from train.data.length_table import LengthTable
    from train.data.loader import Planner

    table = LengthTable(np.load(path, mmap_mode="r"), "published", path.parent, {}, 0)
    stage = StageConfig("finetune", {"projector": 1e-3}, batch_size=128, max_length=4096)
    costs = StepCosts(tile=1.2e12, token=4.0e10, pair=1.6e6)
    packing = PackingConfig(max_tokens=16_384, max_tiles=64)
    planner = Planner(table, stage, packing, costs, 0, 0, num_ranks, num_sources=len(SOURCES))
    before = {key: memory_mib(key) for key in ("VmRSS", "RssAnon")}
    started, cpu = time.monotonic(), cpu_seconds()
    for step in range(planner.num_steps):
        planner.plan(step)
    return {
        "num_samples": len(table),
        "num_steps": planner.num_steps,
        "num_ranks": num_ranks,
        "cpu_s": cpu_seconds() - cpu,
        "wall_s": time.monotonic() - started,
        "peak_mib": memory_mib("VmHWM"),
        "imports_mib": before["VmRSS"],
        "grown_mib": memory_mib("VmHWM") - before["VmRSS"],
        "table_mib": table.rows.nbytes / 2**20,
        "anonymous_grown_mib": memory_mib("RssAnon") - before["RssAnon"],
    }


def plan_table(results: Result) -> str:
    """One line for each number of samples."""
    columns = (
        ("num_steps", "steps", ",d"),
        ("cpu_s", "s", ".1f"),
        ("wall_s", "wall s", ".1f"),
        ("peak_mib", "peak MiB", ".0f"),
        ("grown_mib", "of it grown", ".0f"),
        ("table_mib", "table's file MiB", ".0f"),
    )
    rows = {f"{run['num_samples']:,}": run for run in results.values()}
    return columns_table(columns, rows, "samples planned") + "\n"


# ------------------------------------------------------------------------------------------------- program

MEASURED_ALONE: dict[str, Callable[..., Result]] = {
    "lengths": lambda folder, num_samples, num_workers: write_lengths(Path(folder), int(num_samples), int(num_workers)),
    "plan": lambda path, num_ranks: plan_epoch(Path(path), int(num_ranks)),
}


def missed_goals(results: Result) -> list[str]:
    """One sentence for every goal that the results miss."""
    missed = []
    if "tiles" in results and results["tiles"]["all"]["ratio"] < GOAL_TILES:
        missed.append(f"tiles: {results['tiles']['all']['ratio']:.2f} times transformers, the goal is {GOAL_TILES}")
    run = results.get("plan", {}).get("times_1")
    if run and run["cpu_s"] > GOAL_PLAN_S:
        missed.append(f"plan: {run['cpu_s']:.1f} s, the goal is {GOAL_PLAN_S}")
    if run and run["peak_mib"] > GOAL_PLAN_MIB:
        missed.append(f"plan: {run['peak_mib']:.0f} MiB, the goal is {GOAL_PLAN_MIB:.0f}")
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns 1 if a goal is missed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser(PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pictures", type=int, default=64, help="images of the parts tiles and loader")
    parser.add_argument("--samples", type=int, default=6000, help="of the part lengths")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.alone:
        print(json.dumps(MEASURED_ALONE[options.alone[0]](*options.alone[1:])))
        return 0
    from input_path.loader import loader_table, measure_loader

    results: Result = {}
    measure: dict[str, Callable[[Path], Result]] = {
        "tiles": lambda _: measure_tiles(options.pictures),
        "lengths": lambda folder: measure_lengths(options.samples, folder),
        "plan": measure_plan,
        "loader": lambda folder: measure_loader(options.pictures, folder),
    }
    tables = {"tiles": tiles_table, "lengths": lengths_table, "plan": plan_table, "loader": loader_table}
    for part in options.parts:
        with TemporaryDirectory() as folder:
            results[part] = measure[part](Path(folder))
        print(tables[part](results[part]), flush=True)
    save("input", PROGRAM, words, results, options.out)
    missed = missed_goals(results)
    print("\n".join(missed or ["every goal is reached"]))
    return int(bool(missed))
