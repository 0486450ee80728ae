"""Charts of lines, stacked areas and histograms, as shapes on a pair of axes. `templates/macros.html` draws them.

Colours are CSS variables of the page, so one drawing serves light and dark.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
WIDTH, HEIGHT = 392, 200
"""The plotted area, in units of the SVG."""
_NUM_COLORS, _MAX_TICKS, _MAX_ZONES, _MAX_DOTS, _NUM_BINS = 10, 8, 60, 30, 40
_LOG_RATIO = 8.0
"""From this ratio of the highest to the lowest value, the axis is logarithmic."""
_LIMIT_RATIO, _MIN_VALUES_FOR_LIMIT = 4.0, 20
"""From this ratio of the highest value to the 97th percentile, an axis from zero ends at 1.5 times the latter."""


@dataclass(frozen=True)
class Line:
    """Values by step, [n] each; `low` and `high` are their range where they are means. A checkbox hides a `run`."""

    label: str
    run: int
    color: int
    steps: Numbers
    values: Numbers
    low: Numbers | None = None
    high: Numbers | None = None


class Shape(NamedTuple):
    """An SVG path with its CSS class, its number of a colour and of a run, and the text under the pointer."""

    kind: str
    path: str
    color: int | None = None
    run: int | None = None
    title: str = ""


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` along `length` units."""

    low: float
    high: float
    length: float
    is_log: bool = False
    is_integer: bool = False

    def positions(self, values: npt.ArrayLike) -> list[float]:
        """Where values are on the axis, rounded to what a screen can show."""
        low, high, at = (np.log(v) if self.is_log else np.asarray(v, float) for v in (self.low, self.high, values))
        return [round(float(x), 1) for x in np.atleast_1d((at - low) / (high - low) * self.length)]

    def ticks(self) -> list[tuple[str, float]]:
        """(label, position) of about `_MAX_TICKS` round values."""
        if self.is_log:
            first, last = int(np.floor(np.log10(self.low))), int(np.ceil(np.log10(self.high)))
            factors = (1, 2, 5) if self.high / self.low < 2000 else (1,)
            powers = range(first, last + 1, max(1, (last - first) // _MAX_TICKS))
            values = [v for p in powers for f in factors if self.low <= (v := f * 10.0**p) <= self.high]
        else:
            span = (self.high - self.low) / _MAX_TICKS
            power = 10.0 ** np.floor(np.log10(span))
            step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span * (1 - 1e-9))
            step = max(1, round(step)) if self.is_integer else step
            values = [n * step for n in range(int(np.ceil(self.low / step)), int(self.high // step) + 1)]
        return list(zip(map(_format_tick, values), self.positions(values), strict=True))


class Drawing(NamedTuple):
    """The axes of a chart, its shapes in the order of drawing, and sentences below it."""

    x: Axis
    y: Axis
    shapes: list[Shape]
    notes: list[str]


@dataclass(frozen=True)
class Chart:
    """Lines, at least one where it is drawn.

    Attributes:
        title, unit: the heading.
        from_zero: the axis of values begins at zero.
        marks: (run, step) of dotted vertical lines.
        ticks: (run, step) of short lines at the upper edge.
        is_stack: the values are stacked as areas.
        level: a value and its name, drawn as a dashed horizontal line.
        marked_step: a step whose points are emphasised.
    """

    title: str
    unit: str
    lines: list[Line]
    from_zero: bool = False
    marks: list[tuple[int, int]] = field(default_factory=list)
    ticks: list[tuple[int, int]] = field(default_factory=list)
    is_stack: bool = False
    level: tuple[float, str] | None = None
    marked_step: int | None = None

    @property
    def key(self) -> list[tuple[int, str]]:
        """(color, label) of each line."""
        return [(line.color % _NUM_COLORS, line.label) for line in self.lines]

    def draw(self) -> Drawing:
        """Where everything is."""
        lines, notes = self.lines, []
        if self.is_stack:
            tops = np.cumsum([line.values for line in lines], axis=0)
            lines = [replace(line, low=top - line.values, high=top) for line, top in zip(lines, tops, strict=True)]
        highs = np.concatenate([line.values if line.high is None else line.high for line in lines])
        lowest = min(float((line.values if line.low is None else line.low).min()) for line in lines)
        highest = max(float(highs.max()), self.level[0] if self.level else -np.inf)
        is_log = not self.from_zero and lowest > 0 and highest / lowest > _LOG_RATIO
        low, high = _pad(lowest, highest, 0.05, is_log)
        if self.from_zero:
            low, high = 0.0, 1.05 * highest or 1.0
            usual = float(np.quantile(tops[-1] if self.is_stack else highs, 0.97))
            if len(highs) >= _MIN_VALUES_FOR_LIMIT and 0 < _LIMIT_RATIO * usual < highest:
                high = 1.5 * usual
                notes.append(f"single values up to {highest:.4g} are above the axis")
        steps = np.unique(np.concatenate([line.steps for line in lines]))
        x = Axis(*_pad(float(steps[0]), float(steps[-1]), 0.02), WIDTH, is_integer=True)
        y = Axis(low, high, HEIGHT, is_log)
        shapes = [Shape("mark", f"M{x.positions(s)[0]} 0V{HEIGHT}", run % _NUM_COLORS, run) for run, s in self.marks]
        shapes += [Shape("tick", f"M{x.positions(s)[0]} 0v12", run % _NUM_COLORS, run) for run, s in self.ticks]
        shapes += [shape for line in lines for shape in self._draw_line(line, x, y)]
        if self.level:
            shapes.append(Shape("level", f"M0 {HEIGHT - y.positions(self.level[0])[0]}H{WIDTH}"))
            notes.append(f"dashed: {self.level[1]}")
        return Drawing(x, y, shapes + list(self._draw_zones(steps, x)), notes)

    def _draw_line(self, line: Line, x: Axis, y: Axis) -> Iterator[Shape]:
        ats, owner = x.positions(line.steps), (line.color % _NUM_COLORS, line.run)

        def points(values: Numbers) -> list[str]:
            return [f"{at} {HEIGHT - up:.1f}" for at, up in zip(ats, y.positions(values), strict=True)]

        if line.low is not None and line.high is not None:
            outline = "L".join([*points(line.high), *points(line.low)[::-1]])
            yield Shape("area" if self.is_stack else "band", f"M{outline}Z", *owner)
        if not self.is_stack:
            middle = points(line.values)
            yield Shape("line", f"M{'L'.join(middle)}", *owner)
            if len(middle) <= _MAX_DOTS:
                yield Shape("dots", "".join(f"M{point}h0" for point in middle), *owner)
            marked = [point for point, step in zip(middle, line.steps, strict=True) if step == self.marked_step]
            yield Shape("dots here", "".join(f"M{point}h0" for point in marked), *owner)

    def _draw_zones(self, steps: Numbers, x: Axis) -> Iterator[Shape]:
        """Invisible stripes; a browser shows the title of the one under the pointer."""
        chosen = steps[np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MAX_ZONES)).astype(int))]
        middles = np.array(x.positions(chosen))
        edges = [0.0, *((middles[1:] + middles[:-1]) / 2).tolist(), float(WIDTH)]
        for left, right, step in zip(edges, edges[1:], chosen.tolist(), strict=False):
            texts = [f"step {step:.0f}"]
            for line in self.lines:
                at = int(np.abs(line.steps - step).argmin())
                usual = (line.steps[-1] - line.steps[0]) / max(1, len(line.steps) - 1)
                if abs(line.steps[at] - step) <= max(usual, 1.0):  # else the line has no such step
                    texts.append(f"{line.label + ': ' if len(self.lines) > 1 else ''}{line.values[at]:.5g}")
                    if line.low is not None and line.high is not None:
                        texts[-1] += f" ({line.low[at]:.4g} to {line.high[at]:.4g})"
            yield Shape("zone", f"M{left:.1f} 0H{right:.1f}V{HEIGHT}H{left:.1f}Z", title="\n".join(texts))


@dataclass(frozen=True)
class Histogram:
    """The counts of values [n], n >= 1, with marks [m] on the axis; `is_log`: equal lengths are equal ratios."""

    title: str
    values: Numbers
    marks: Numbers
    is_log: bool = False
    unit: str = ""
    key: tuple[()] = ()

    def draw(self) -> Drawing:
        """Where everything is."""
        every = np.concatenate([self.values, self.marks])
        low, high = float(every.min()), float(every.max())
        if self.is_log:
            edges = np.geomspace(low / 1.02, high * 1.02, _NUM_BINS + 1)
        else:  # whole numbers, each its own bar where there is room
            width = max(1, int(np.ceil((high - low + 1) / _NUM_BINS)))
            edges = np.arange(low, high + 1 + width, width)
        counts = np.histogram(self.values, edges)[0].tolist()
        x = Axis(float(edges[0]), float(edges[-1]), WIDTH, self.is_log, is_integer=not self.is_log)
        y = Axis(0.0, 1.05 * max(counts), HEIGHT, is_integer=True)
        ends, ups = x.positions(edges), y.positions(counts)
        shapes = []
        for n, count in enumerate(counts):
            if count:
                path = f"M{ends[n]} {HEIGHT}v{-max(1, ups[n])}H{max(ends[n] + 0.8, ends[n + 1] - 0.6):.1f}V{HEIGHT}Z"
                shapes.append(Shape("bar", path, title=f"{edges[n]:.4g} to {edges[n + 1]:.4g}: {count:,}"))
        ticks = sorted(set(x.positions(self.marks)))
        shapes.append(Shape("ticks", "".join(f"M{at} {HEIGHT}v-12" for at in ticks)))
        low, median, late, high = np.quantile(self.values, [0, 0.5, 0.95, 1])
        note = f"from {low:,.4g} to {high:,.4g}, median {median:,.4g}, mean {self.values.mean():,.4g}, "
        return Drawing(x, y, shapes, [f"{note}95 % below {late:,.4g}"])


def _pad(low: float, high: float, share: float, is_log: bool = False) -> tuple[float, float]:
    """The range with a margin at both ends."""
    if is_log:
        return low / (high / low) ** share, high * (high / low) ** share
    margin = (high - low) * share or abs(high) * share or 1.0
    return low - margin, high + margin


def _format_tick(value: float) -> str:
    for size, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= size:
            return f"{value / unit:.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
