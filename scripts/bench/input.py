"""From stored bytes to batches: how fast, and what it costs in memory.

    python scripts/bench/input.py [--parts tiles lengths plan loader] [--pictures 64] [--samples 6000]

Four parts, each a table: *tiles*, ours against transformers' PIL processor on the same pictures, pixels held equal;
*lengths*, the length table from headers and text; *plan*, every step of an epoch of the published mixture and of ten
times as many samples; *loader*, batches through the real loader, also with 5 ms added to each read. Seconds are
processor seconds unless a row says wall: other programs on the machine have less say in them. Needs the quickstart's
assets: `python scripts/quickstart/assets.py`. Results: scripts/bench/results/input.json.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from results import machine_facts, memory_mib, save, table

PARTS = ("tiles", "lengths", "plan", "loader")
PUBLISHED = 779_278
GOAL_TILES, GOAL_PLAN_S, GOAL_PLAN_MIB = 3.0, 10.0, 500.0

Result = dict[str, Any]


def cpu_seconds() -> float:
    """Processor seconds of this process and of its children that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def in_own_process(part: str, *arguments: object) -> Result:
    """Runs one measurement alone, so that its memory is its own; it prints its result as JSON."""
    command = [sys.executable, __file__, "--alone", part, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found


# --------------------------------------------------------------------------------------------------- tiles


def measure_tiles(num_pictures: int, rounds: int = 5) -> Result:
    """All pictures by each path in turn, several rounds, and of each picture its quickest one.

    A path takes all pictures before the next begins: freed memory that one path leaves behind, or gives back to the
    system, would be the other's profit or loss.
    """
    from input_materials import TILE, layout_of, pictures
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    from llava_next.config import AUTHORS_GRIDS
    from llava_next.inputs.anyres import cut_tiles, decode, resized_hw

    stock = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[[rows * TILE, cols * TILE] for rows, cols in AUTHORS_GRIDS],
    )
    kinds, encoded = zip(*pictures(num_pictures), strict=True)
    images = [decode(picture) for picture in encoded]
    layouts = [layout_of((image.height, image.width)) for image in images]

    def resize(number: int) -> None:
        """What of our cutting is Pillow's own: once to the base view, once to the grid."""
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
    for number in range(num_pictures):
        check_pixels(stock, paths["tiles"](number), np.asarray(paths["stock_tiles"](number)))
    seconds = {name: np.full(num_pictures, np.inf) for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            for number in range(num_pictures):
                started = time.process_time()
                path(number)
                seconds[name][number] = min(seconds[name][number], time.process_time() - started)
    seconds["num_pictures"] = np.ones(num_pictures)
    seconds["num_tiles"] = np.array([layout.num_tiles for layout in layouts], dtype=np.float64)
    chosen = {kind: np.array([kind == other for other in kinds]) for kind in sorted(set(kinds), reverse=True)}
    chosen["all"] = np.ones(num_pictures, dtype=bool)
    return {
        kind: rates({name: float(values[of].sum()) for name, values in seconds.items()}) for kind, of in chosen.items()
    }


def rates(total: dict[str, float]) -> Result:
    """What the processor seconds of a kind of pictures amount to."""
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
    """Our tiles, rescaled and normalised by the stock processor's own functions, are its pixels bit for bit."""
    normalised = [
        stock.normalize(stock.rescale(tile.transpose(2, 0, 1), stock.rescale_factor), stock.image_mean, stock.image_std)
        for tile in tiles
    ]
    np.testing.assert_array_equal(np.array(normalised), pixels)


def show_tiles(found: Result) -> str:
    """The table of the tiles' part."""
    lines = [
        [
            kind,
            f"{part['cpu_s']['num_pictures']:.0f}",
            f"{part['tiles_per_core_second']:.0f}",
            f"{part['stock_tiles_per_core_second']:.0f}",
            f"{part['ratio']:.2f}",
            f"{part['ratio_with_decode']:.2f}",
            f"{part['resize_share']:.0%}",
            f"{part['pictures_decoded_per_core_second']:.0f}",
        ]
        for kind, part in found.items()
    ]
    header = ["tiles/s and core", "pictures", "ours", "transformers", "times", "decode included", "resize's share"]
    return table([*header, "pictures decoded/s"], lines) + "\n"


# ------------------------------------------------------------------------------------------------- lengths


def measure_lengths(num_samples: int, folder: Path) -> Result:
    """Writes the table with one process and with two, and with one of a quarter of the samples."""
    from input_materials import plain_pictures, write_mixture

    write_mixture(folder, "text", num_samples, plain_pictures(256))
    one, two = (in_own_process("lengths", folder, num_samples, workers) for workers in (1, 2))
    quarter = in_own_process("lengths", folder, num_samples // 4, 1)
    rate = num_samples / one["cpu_s"]
    return {
        "one_process": one,
        "two_processes": two,
        "quarter": quarter,
        "samples_per_core_second": rate,
        "published_on_2_cores_s": PUBLISHED / (2 * rate),
        "published_on_32_cores_s": PUBLISHED / (32 * rate),
    }


def write_lengths(folder: Path, num_samples: int, num_workers: int) -> Result:
    """One table, in this process."""
    from input_materials import open_mixture, processor

    from train.data.length_table import open_table

    mixture, ours = open_mixture(folder, "text", num_samples), processor()
    before, started, cpu = memory_mib("VmHWM"), time.monotonic(), cpu_seconds()
    place = folder / f"lengths_{num_workers}"
    table = open_table(mixture, ours, place, is_writer=True, num_workers=num_workers, show_progress=False)
    return {
        "num_samples": len(mixture.source_ids),
        "mean_tokens": float(table.rows["tokens"].mean()),
        "wall_s": time.monotonic() - started,
        "cpu_s": cpu_seconds() - cpu,
        "grown_mib": memory_mib("VmHWM") - before,
    }


def show_lengths(found: Result) -> str:
    """The table of the lengths' part."""
    lines = [
        [
            name,
            f"{run['num_samples']:,}",
            f"{run['num_samples'] / run['cpu_s']:,.0f}",
            f"{run['wall_s']:.1f}",
            f"{run['grown_mib']:.0f}",
        ]
        for name, run in (
            ("1 process", found["one_process"]),
            ("2 processes", found["two_processes"]),
            ("1 process, a quarter of the samples", found["quarter"]),
        )
    ]
    header = ["length table", "samples", "samples/s and core", "wall s", "memory grew by MiB"]
    times = found["published_on_2_cores_s"], found["published_on_32_cores_s"]
    return (
        f"{table(header, lines)}\n779,278 samples at that rate: {times[0]:.0f} s on 2 cores, {times[1]:.0f} s on 32\n"
    )


# ---------------------------------------------------------------------------------------------------- plan


def measure_plan(folder: Path, num_ranks: int = 32) -> Result:
    """Every step of an epoch, by one process: of the published mixture, and of ten times as many samples."""
    from input_materials import write_published_rows

    found = {}
    for times in (1, 10):
        write_published_rows(folder / "rows.npy", times * PUBLISHED)
        found[f"times_{times}"] = in_own_process("plan", folder / "rows.npy", num_ranks)
    return found


def plan_epoch(path: Path, num_ranks: int) -> Result:
    """All plans of one rank, one after the other, as a run makes them. Costs are rounded ones of a 7B model."""
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


def show_plan(found: Result) -> str:
    """The table of the plan's part."""
    lines = [
        [
            f"{run['num_samples']:,}",
            f"{run['num_steps']:,}",
            *(f"{run[key]:.1f}" for key in ("cpu_s", "wall_s")),
            *(f"{run[key]:.0f}" for key in ("peak_mib", "grown_mib", "table_mib")),
        ]
        for run in found.values()
    ]
    header = ["samples planned", "steps", "s", "wall s", "peak MiB", "of it grown", "table's file MiB"]
    return table(header, lines) + "\n"


# ------------------------------------------------------------------------------------------------- program

ALONE: dict[str, Callable[..., Result]] = {
    "lengths": lambda folder, num_samples, num_workers: write_lengths(Path(folder), int(num_samples), int(num_workers)),
    "plan": lambda path, num_ranks: plan_epoch(Path(path), int(num_ranks)),
}


def goals_missed(found: Result) -> list[str]:
    """One sentence for every goal that the results miss."""
    missed = []
    if "tiles" in found and found["tiles"]["all"]["ratio"] < GOAL_TILES:
        missed.append(f"tiles: {found['tiles']['all']['ratio']:.2f} times transformers, the goal is {GOAL_TILES}")
    run = found.get("plan", {}).get("times_1")
    if run and run["cpu_s"] > GOAL_PLAN_S:
        missed.append(f"plan: {run['cpu_s']:.1f} s, the goal is {GOAL_PLAN_S}")
    if run and run["peak_mib"] > GOAL_PLAN_MIB:
        missed.append(f"plan: {run['peak_mib']:.0f} MiB, the goal is {GOAL_PLAN_MIB:.0f}")
    return missed


def main() -> int:
    """The program; returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pictures", type=int, default=64, help="of the parts tiles and loader")
    parser.add_argument("--samples", type=int, default=6000, help="of the part lengths")
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(ALONE[args.alone[0]](*args.alone[1:])))
        return 0
    from input_loader import measure_loader, show_loader

    found: Result = {}
    measure: dict[str, Callable[[Path], Result]] = {
        "tiles": lambda _: measure_tiles(args.pictures),
        "lengths": lambda folder: measure_lengths(args.samples, folder),
        "plan": measure_plan,
        "loader": lambda folder: measure_loader(args.pictures, folder),
    }
    show = {"tiles": show_tiles, "lengths": show_lengths, "plan": show_plan, "loader": show_loader}
    for part in args.parts:
        with TemporaryDirectory() as folder:
            found[part] = measure[part](Path(folder))
        print(show[part](found[part]), flush=True)
    save("input", ["python", "scripts/bench/input.py", *sys.argv[1:]], machine_facts(), found)
    missed = goals_missed(found)
    print("\n".join(missed or ["every goal is reached"]))
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
