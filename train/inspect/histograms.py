"""Histograms and a curve as inline SVG, in the page's own colours.

Owns their form; the numbers are the caller's.
"""

from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt

_WIDTH, _HEIGHT, _TOP, _BOTTOM = 320, 130, 6, 30
_NUM_BINS = 40
_MOST_MARKS = 512

Numbers = npt.NDArray[np.float64]


def histogram(title: str, values: Numbers, marks: Numbers, *, log: bool = False) -> str:
    """Bars for all values, and a mark below the axis for each of the samples that the page shows.

    Args:
        title: says what is counted.
        values: of all, [n]; above zero where `log`.
        marks: of the shown, [m].
        log: equal steps of the axis are equal ratios.
    """
    if not len(values):
        return ""
    edges = _edges(values, marks, log)
    counts, _ = np.histogram(values, edges)
    place = np.log(edges) if log else edges
    scale = (_WIDTH - 2) / (place[-1] - place[0])
    xs = 1 + (place - place[0]) * scale
    floor = _HEIGHT - _BOTTOM
    bars = []
    for number, count in enumerate(counts.tolist()):
        if count:
            height = max(1.0, (floor - _TOP) * count / counts.max())
            bars.append(
                f'<rect class="bar" x="{xs[number]:.1f}" y="{floor - height:.1f}" '
                f'width="{max(0.8, xs[number + 1] - xs[number] - 0.6):.1f}" height="{height:.1f}">'
                f"<title>{edges[number]:.4g} to {edges[number + 1]:.4g}: {count:,}</title></rect>"
            )
    at = np.log(marks) if log else marks
    ticks = "".join(f"M{x:.1f} {floor + 2}v7" for x in (1 + (at[:_MOST_MARKS] - place[0]) * scale).tolist())
    low, high = f"{values.min():,.4g}", f"{values.max():,.4g}"
    middle, late = np.quantile(values, [0.5, 0.95])
    body = (
        f'{"".join(bars)}<path class="axis" d="M0 {floor}H{_WIDTH}"/><path class="marks" d="{ticks}"/>'
        f'<text x="1" y="{_HEIGHT - 6}">{low}</text><text x="{_WIDTH - 1}" y="{_HEIGHT - 6}" class="end">{high}</text>'
    )
    caption = f"{escape(title)}: median {middle:,.4g}, mean {values.mean():,.4g}, 95 % below {late:,.4g}"
    return _chart(body, caption)


def curve(title: str, steps: Sequence[int], values: Sequence[float], marked: int) -> str:
    """A line over steps, and one of the steps marked."""
    if len(steps) < 2:
        return ""
    low, high = min(values), max(values)
    xs = [3 + (_WIDTH - 6) * (step - steps[0]) / (steps[-1] - steps[0]) for step in steps]
    floor = _HEIGHT - _BOTTOM
    ys = [floor - (floor - _TOP - 4) * (value - low) / ((high - low) or 1.0) for value in values]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    dots = "".join(
        f'<circle class="{"here" if step == marked else "dot"}" cx="{x:.1f}" cy="{y:.1f}" '
        f'r="{3.5 if step == marked else 1.6}"><title>step {step}: {value:.4f}</title></circle>'
        for step, value, x, y in zip(steps, values, xs, ys, strict=True)
    )
    body = (
        f'<polyline class="line" points="{points}"/>{dots}<path class="axis" d="M0 {floor + 4}H{_WIDTH}"/>'
        f'<text x="1" y="{_HEIGHT - 6}">step {steps[0]}</text>'
        f'<text x="{_WIDTH - 1}" y="{_HEIGHT - 6}" class="end">step {steps[-1]}</text>'
    )
    return _chart(body, f"{escape(title)}, from {low:.4f} to {high:.4f}")


def _edges(values: Numbers, marks: Numbers, log: bool) -> Numbers:
    """Bounds of the bars: whole numbers where there are few of them, else equal steps."""
    low = float(min(values.min(), marks.min(initial=np.inf)))
    high = float(max(values.max(), marks.max(initial=-np.inf)))
    if log:
        return np.geomspace(low / 1.02, high * 1.02, _NUM_BINS + 1)
    step = max(1, int(np.ceil((high - low + 1) / _NUM_BINS)))
    return np.arange(low, high + 1 + step, step, dtype=np.float64)


def _chart(body: str, caption: str) -> str:
    return (
        f'<figure class="chart"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{body}</svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
