"""Bar, line and pie charts of a Table, drawn by Pillow, and questions whose answers can be read from the image."""

import math
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from vega_tables import Table

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Colours by the names that a question about them uses.
PALETTE: dict[str, Colour] = {
    "blue": (49, 105, 178),
    "orange": (235, 130, 30),
    "green": (62, 150, 75),
    "red": (200, 50, 55),
    "purple": (125, 85, 165),
    "brown": (125, 82, 62),
    "pink": (222, 120, 175),
    "gray": (125, 125, 130),
}
INK: Colour = (38, 42, 50)
FAINT: Colour = (222, 224, 228)
SIZES_HW = ((320, 480), (400, 400), (300, 600), (480, 360), (400, 640), (336, 448))
_OVERSAMPLING = 2  # drawn twice as large and reduced, which smooths lines, arcs and letters alike


@dataclass(frozen=True)
class Style:
    """The appearance of a chart. `font` None is the default font of Pillow."""

    kind: str  # "bar", "hbar", "line", "pie"
    size_hw: tuple[int, int]
    colour: str
    font: Path | None = None
    background: Colour = (255, 255, 255)


@dataclass(frozen=True)
class Question:
    """A question on a chart; `reasoning` separates ChartQA's human questions from its augmented ones."""

    text: str
    answer: str
    reasoning: bool


def kinds(table: Table) -> list[str]:
    """The kinds of chart that are suitable for a table."""
    if table.in_time:
        return ["line", "bar"]
    wide = max(map(len, table.labels)) * len(table.labels) > 40
    bars = ["hbar"] if wide else ["bar", "hbar"]
    return [*bars, "pie"] if table.shares and min(table.values) > 0.04 * sum(table.values) else bars


def choose_style(table: Table, fonts: list[Path], rng: random.Random) -> Style:
    """A random style that is suitable for the table."""
    kind = rng.choice(kinds(table))
    sizes = [size for size in SIZES_HW if kind not in ("line", "bar") or size[1] >= 400 or len(table.labels) <= 5]
    tint = rng.choice(((255, 255, 255), (255, 255, 255), (250, 248, 242), (244, 247, 250)))
    return Style(kind, rng.choice(sizes), rng.choice(list(PALETTE)), rng.choice(fonts) if fonts else None, tint)


def font_files(cache: Path) -> list[Path]:
    """The font files of the cache's synthdog folder, in the order of their names."""
    return sorted((cache / "synthdog" / "fonts").glob("*.ttf"))


@lru_cache(maxsize=512)
def load_font(path: Path | None, pixels: int) -> Font:
    """A font of that height in pixels; None is the default font of Pillow."""
    return ImageFont.load_default(pixels) if path is None else ImageFont.truetype(path, pixels)


class _Canvas:
    """An image with coordinates in final pixels, as floats; it is drawn larger and reduced at the end."""

    def __init__(self, style: Style) -> None:
        self.height, self.width = style.size_hw
        self.font_path = style.font
        self.image = Image.new("RGB", (self.width * _OVERSAMPLING, self.height * _OVERSAMPLING), style.background)
        self.draw = ImageDraw.Draw(self.image)

    def font(self, size: float) -> Font:
        return load_font(self.font_path, round(size * _OVERSAMPLING))

    def text(self, x: float, y: float, text: str, size: float, anchor: str, colour: Colour = INK) -> None:
        self.draw.text((x * _OVERSAMPLING, y * _OVERSAMPLING), text, colour, self.font(size), anchor=anchor)

    def text_width(self, text: str, size: float) -> float:
        return self.font(size).getlength(text) / _OVERSAMPLING

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.draw.rectangle([round(v * _OVERSAMPLING) for v in (x0, y0, x1, y1)], fill=colour)

    def line(self, points: list[tuple[float, float]], colour: Colour, width: float) -> None:
        scaled = [(x * _OVERSAMPLING, y * _OVERSAMPLING) for x, y in points]
        self.draw.line(scaled, colour, round(width * _OVERSAMPLING), joint="curve")

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        self.draw.circle((x * _OVERSAMPLING, y * _OVERSAMPLING), radius * _OVERSAMPLING, fill=colour)

    def reduced(self) -> Image.Image:
        return self.image.reduce(_OVERSAMPLING)


def draw_chart(table: Table, style: Style) -> Image.Image:
    """The chart as an RGB image of `style.size_hw`, with readable title, unit, labels and values."""
    canvas = _Canvas(style)
    size = 17.0
    while canvas.text_width(table.title, size) > canvas.width - 20:
        size -= 0.5
    canvas.text(canvas.width / 2, 10, table.title, size, "ma")
    if table.unit:
        canvas.text(canvas.width / 2, 33, f"({table.unit})", 12, "ma", (95, 98, 106))
    {"bar": _bars, "hbar": _horizontal_bars, "line": _line, "pie": _pie}[style.kind](canvas, table, style)
    return canvas.reduced()


def _ticks(low: float, top: float) -> list[float]:
    """Three to seven round numbers from the last one at or below `low` to the first one at or above `top`."""
    rough = (top - low) / 4
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [step * k for k in range(math.floor(low / step), math.ceil(top / step - 1e-9) + 1)]


def _vertical_frame(canvas: _Canvas, table: Table, from_zero: bool) -> tuple[list[float], list[float]]:
    """Draws axis, grid and tick labels; returns the x of the middle of every row and the y of its value."""
    smallest, largest = min(table.values), max(table.values)
    spread = largest - smallest
    near = not from_zero and 0 < spread < smallest / 2
    ticks = _ticks(smallest - 0.3 * spread if near else 0, largest + 0.08 * (spread if near else largest))
    names = [f"{tick:g}" for tick in ticks]
    left = 14 + max(canvas.text_width(name, 12) for name in names)
    right, top, bottom = canvas.width - 14.0, 62.0, canvas.height - 30.0
    for tick, name in zip(ticks, names, strict=True):
        y = bottom - (bottom - top) * (tick - ticks[0]) / (ticks[-1] - ticks[0])
        canvas.line([(left, y), (right, y)], FAINT if tick != ticks[0] else INK, 1)
        canvas.text(left - 6, y, name, 12, "rm")
    slot = (right - left) / len(table.values)
    heights = [bottom - (bottom - top) * (value - ticks[0]) / (ticks[-1] - ticks[0]) for value in table.values]
    return [left + slot * (row + 0.5) for row in range(len(heights))], heights


def _slot_labels(canvas: _Canvas, table: Table, centres: list[float]) -> float:
    """Draws the labels below the axis; returns the y of the axis."""
    slot, bottom = _slot(canvas, centres), canvas.height - 30.0
    size = 13.0
    while size > 8 and max(canvas.text_width(label, size) for label in table.labels) > slot - 4:
        size -= 0.5
    for label, x in zip(table.labels, centres, strict=True):
        canvas.text(x, bottom + 7, label, size, "ma")
    return bottom


def _slot(canvas: _Canvas, centres: list[float]) -> float:
    return centres[1] - centres[0] if len(centres) > 1 else canvas.width / 2


def _value_size(canvas: _Canvas, table: Table, slot: float) -> float:
    size = 13.0
    while size > 8 and max(canvas.text_width(table.show(value), size) for value in table.values) > slot - 3:
        size -= 0.5
    return size


def _bars(canvas: _Canvas, table: Table, style: Style) -> None:
    centres, heights = _vertical_frame(canvas, table, from_zero=True)
    bottom = _slot_labels(canvas, table, centres)
    slot = _slot(canvas, centres)
    for row, (x, y) in enumerate(zip(centres, heights, strict=True)):
        canvas.box(x - slot * 0.33, y, x + slot * 0.33, bottom, PALETTE[style.colour])
        canvas.text(x, y - 3, table.shown(row), _value_size(canvas, table, slot), "mb")


def _line(canvas: _Canvas, table: Table, style: Style) -> None:
    centres, heights = _vertical_frame(canvas, table, from_zero=False)
    bottom = _slot_labels(canvas, table, centres)
    points = list(zip(centres, heights, strict=True))
    canvas.line(points, PALETTE[style.colour], 2.5)
    size = _value_size(canvas, table, _slot(canvas, centres))
    for row, (x, y) in enumerate(points):
        canvas.dot(x, y, 4, PALETTE[style.colour])
        # Numbers are placed beside the line: below minima, above all other points.
        around = heights[max(0, row - 1) : row] + heights[row + 1 : row + 2]
        below = all(y > other for other in around) and y + 22 < bottom
        steep = row + 1 < len(points) and y - heights[row + 1] > 18
        dx, dy, anchor = (0, 7, "ma") if below else (2, -7, "rb") if steep else (0, -7, "mb")
        canvas.text(x + dx, y + dy, table.shown(row), size, anchor)


def _horizontal_bars(canvas: _Canvas, table: Table, style: Style) -> None:
    widest_value = max(canvas.text_width(table.show(value), 13) for value in table.values)
    size = 13.0
    while size > 8 and max(canvas.text_width(label, size) for label in table.labels) > canvas.width * 0.4:
        size -= 0.5
    left = 18 + max(canvas.text_width(label, size) for label in table.labels)
    right, top, bottom = canvas.width - widest_value - 20, 58.0, canvas.height - 14.0
    slot = (bottom - top) / len(table.values)
    for row, (label, value) in enumerate(zip(table.labels, table.values, strict=True)):
        y = top + slot * (row + 0.5)
        x = left + (right - left) * value / max(table.values)
        canvas.box(left, y - slot * 0.33, x, y + slot * 0.33, PALETTE[style.colour])
        canvas.text(left - 7, y, label, size, "rm")
        canvas.text(x + 5, y, table.shown(row), 13, "lm")
    canvas.line([(left, top), (left, bottom)], INK, 1)


def slice_colours(table: Table, style: Style) -> list[str]:
    """The colour names of a pie's slices, in the order of the labels."""
    names = list(PALETTE)
    start = names.index(style.colour)
    return [names[(start + row) % len(names)] for row in range(len(table.labels))]


def _pie(canvas: _Canvas, table: Table, style: Style) -> None:
    names = slice_colours(table, style)
    side_by_side = canvas.width > canvas.height
    rows_height = 24.0 * len(table.labels)
    room_h = canvas.height - 58 - (0 if side_by_side else rows_height + 18)
    room_w = canvas.width * (0.56 if side_by_side else 1)
    radius = min(room_h, room_w) / 2 - 10
    cx, cy = (room_w / 2 + 6, 54 + room_h / 2) if side_by_side else (canvas.width / 2, 54 + room_h / 2)
    angle = -90.0
    for name, value in zip(names, table.values, strict=True):
        end = angle + 360 * value / sum(table.values)
        box = [v * _OVERSAMPLING for v in (cx - radius, cy - radius, cx + radius, cy + radius)]
        canvas.draw.pieslice(box, angle, end, PALETTE[name], (255, 255, 255), 3)
        angle = end
    texts = [f"{label}: {table.shown(row)}" for row, label in enumerate(table.labels)]
    x = room_w + 14 if side_by_side else (canvas.width - max(canvas.text_width(t, 14) for t in texts) - 22) / 2
    y = cy - rows_height / 2 if side_by_side else canvas.height - rows_height - 10
    size = 14.0
    while size > 9 and max(canvas.text_width(text, size) for text in texts) > canvas.width - x - 28:
        size -= 0.5
    for row, (name, text) in enumerate(zip(names, texts, strict=True)):
        middle = y + 24 * (row + 0.5)
        canvas.box(x, middle - 7, x + 14, middle + 7, PALETTE[name])
        canvas.text(x + 22, middle, text, size, "lm")


def describe(table: Table, style: Style) -> str:
    """A caption of the chart: its kind and title."""
    kind = {
        "bar": "bar chart",
        "hbar": "bar chart with horizontal bars",
        "line": "line chart",
        "pie": "pie chart",
    }
    return f'A {kind[style.kind]} titled "{table.title}".'


def ask(table: Table, style: Style, rng: random.Random) -> list[Question]:
    """Questions on a chart in random order; a question with two right answers is left out."""
    questions = _read_off(table, style, rng) + _reason(table, rng)
    return rng.sample(questions, len(questions))


def _read_off(table: Table, style: Style, rng: random.Random) -> list[Question]:
    marks = {"bar": "bars", "hbar": "bars", "line": "points", "pie": "slices"}[style.kind]
    row = rng.randrange(len(table.labels))
    where = f"in {table.labels[row]}" if table.in_time else f"for {table.labels[row]}"
    questions = [
        Question(f"How many {marks} are there in the chart?", str(len(table.labels)), False),
        Question(f"What is the {table.quantity} {where}?", table.shown(row), False),
        Question("What is the title of the chart?", table.title, False),
    ]
    if table.unit:
        questions.append(Question(f"In which unit is the {table.quantity} given?", table.unit, False))
    if style.kind == "pie":
        questions.append(
            Question(f"What colour is the slice of {table.labels[row]}?", slice_colours(table, style)[row], False)
        )
    else:
        questions.append(Question(f"What colour are the {marks}?", style.colour, False))
    return questions


def _reason(table: Table, rng: random.Random) -> list[Question]:
    questions: list[Question] = []
    for word, extreme in (("highest", max(table.values)), ("lowest", min(table.values))):
        if table.values.count(extreme) == 1:
            label = table.labels[table.values.index(extreme)]
            questions.append(Question(f"Which {table.category} has the {word} {table.quantity}?", label, True))
            questions.append(Question(f"What is the {word} {table.quantity}?", table.show(extreme), True))
    first, second = sorted(rng.sample(range(len(table.labels)), 2))
    a, b = table.labels[first], table.labels[second]
    if table.values[first] != table.values[second]:
        higher = "Yes" if table.values[first] > table.values[second] else "No"
        at = "in" if table.in_time else "for"
        questions.append(Question(f"Is the {table.quantity} higher {at} {a} than {at} {b}?", higher, True))
        gap = table.show(round(abs(table.values[first] - table.values[second]), 2))
        questions.append(Question(f"What is the difference in {table.quantity} between {a} and {b}?", gap, True))
        if table.in_time:
            change = "Rise" if table.values[second] > table.values[first] else "Fall"
            questions.append(Question(f"Did the {table.quantity} rise or fall from {a} to {b}?", change, True))
    return questions
