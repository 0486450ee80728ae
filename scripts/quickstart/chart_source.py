"""The source chartqa: charts and questions in the folder layout of ChartQA's training split.

Owns file names and the split into human and augmented questions; charts.py draws and asks.
"""

import random
from pathlib import Path
from typing import Any

from charts import ask, choose_style, draw_chart
from llava_layout import save_picture, write_json_lines_list
from tables import read_tables, shuffled


def write_charts(cache: Path, folder: Path, scale: float, seed: int) -> int:
    """Write `ChartQA Dataset/train`; returns how many questions it has."""
    train = folder / "ChartQA Dataset" / "train"
    fonts = sorted((cache / "synthdog" / "fonts").glob("*.ttf"))
    tables = shuffled(read_tables(cache / "vega_datasets"), seed, "chartqa")
    human: list[dict[str, Any]] = []
    augmented: list[dict[str, Any]] = []
    for number in range(max(2, round(250 * scale))):
        rng = random.Random(f"{seed}/chartqa/{number}")
        table = tables[number % len(tables)]
        style = choose_style(table, fonts, rng)
        name = f"{number:05d}.png"
        save_picture(draw_chart(table, style), train / "png" / name)
        questions = ask(table, style, rng)
        for reasoning, records in ((True, human), (False, augmented)):
            for question in [q for q in questions if q.reasoning == reasoning][:2]:
                records.append({"imgname": name, "query": question.text, "label": question.answer})
    write_json_lines_list(train / "train_human.json", human)
    write_json_lines_list(train / "train_augmented.json", augmented)
    return len(human) + len(augmented)
