"""Writes the source chartqa: charts with human and augmented questions, in the layout of ChartQA's training split."""

import random
from pathlib import Path
from typing import Any

from charts import ask, choose_style, draw_chart, font_files
from llava_json import save_image, write_json_lines_list
from vega_tables import read_tables, shuffled


def write_charts(cache: Path, folder: Path, scale: float, seed: int) -> int:
    """Writes `ChartQA Dataset/train`; returns the number of questions."""
    train = folder / "ChartQA Dataset" / "train"
    fonts = font_files(cache)
    tables = shuffled(read_tables(cache / "vega_datasets"), seed, "chartqa")
    human: list[dict[str, Any]] = []
    augmented: list[dict[str, Any]] = []
    for number in range(max(2, round(250 * scale))):
        rng = random.Random(f"{seed}/chartqa/{number}")
        table = tables[number % len(tables)]
        style = choose_style(table, fonts, rng)
        name = f"{number:05d}.png"
        save_image(draw_chart(table, style), train / "png" / name)
        questions = ask(table, style, rng)
        for reasoning, records in ((True, human), (False, augmented)):
            for question in [q for q in questions if q.reasoning == reasoning][:2]:
                records.append({"imgname": name, "query": question.text, "label": question.answer})
    write_json_lines_list(train / "train_human.json", human)
    write_json_lines_list(train / "train_augmented.json", augmented)
    return len(human) + len(augmented)
