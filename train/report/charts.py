"""Charts as inline SVG: matplotlib draws, the page's style colours.

Owns how a chart looks. matplotlib is given placeholder colours, which become the style's variables, so that one drawing
serves light and dark; text stays text in the page's own font. Numbers under the pointer are SVG titles: no script.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.config.schema import ConfigError
from train.html.escaping import shown
from train.report.curves import Chart, Line

NUM_COLORS = 10
_WIDTH, _HEIGHT = 460.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 10.0, 10.0, 30.0
"""In CSS pixels of a chart at its full size."""
_LOG_FROM = 8.0
"""From this ratio of the highest to the lowest value on, equal steps of the axis are equal ratios."""
_LIMIT_FROM, _LEAST_FOR_LIMIT = 4.0, 20
"""From this ratio of the highest to the usual value on, an axis from zero ends above the usual ones."""
_MOST_ZONES = 60
_COLORS = [f"#0a0b{number:02x}" for number in range(NUM_COLORS)]
_INK, _GRID = "#0a0c00", "#0a0c01"
_VARIABLES = {color: f"var(--c{number})" for number, color in enumerate(_COLORS)}
_VARIABLES |= {_INK: "var(--faint)", _GRID: "var(--line)"}


def need_matplotlib() -> None:
    """Raises ConfigError, with the way out, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the charts are drawn by matplotlib, which is not installed: ./scripts/setup.sh --extras report, or pip "
            "install -c constraints.txt matplotlib"
        ) from error


def draw(chart: Chart, number: int, *, marks_runs: bool) -> str:
    """One chart as a figure of HTML.

    Args:
        chart: what is drawn.
        number: of the chart on its page, for names inside the SVG that must be unique there.
        marks_runs: the page tells what the colours are; else the chart has a key of its own.
    """
    limit, above = _limit(chart)
    svg = _svg(chart, number, limit)
    unit = f' <span class="faint">{shown(chart.unit)}</span>' if chart.unit else ""
    entries = [
        f'<span><i style="background:var(--c{line.color % NUM_COLORS})"></i>{shown(line.label)}</span>'
        for line in chart.lines
    ]
    told = [*(entries if len(entries) > 1 and not marks_runs else []), *above]
    if chart.level is not None:
        told.append(f"<span>dashed: {shown(chart.level[1])}</span>")
    caption = f'<figcaption class="key">{"".join(told)}</figcaption>' if told else ""
    return f'<figure class="plot"><h3>{shown(chart.title)}{unit}</h3>{svg}{caption}</figure>'


def _limit(chart: Chart) -> tuple[float | None, list[str]]:
    """Where the axis ends below single values (a first step that compiles) that would flatten all others."""
    if not chart.floor:
        return None, []
    tops = [line.values if line.high is None else line.high for line in chart.lines]
    values = np.sum([line.values for line in chart.lines], axis=0) if chart.is_stack else np.concatenate(tops)
    usual, highest = float(np.quantile(values, 0.97)), float(values.max())
    if len(values) < _LEAST_FOR_LIMIT or highest <= _LIMIT_FROM * usual or usual <= 0:
        return None, []
    return 1.5 * usual, [f"<span>single values up to {highest:.4g} are above the axis</span>"]


def _svg(chart: Chart, number: int, limit: float | None) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"chart{number}",
        "font.size": 11,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "grid.color": _GRID,
        "grid.linewidth": 0.8,
        "path.simplify_threshold": 0.3,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))  # a point of matplotlib is one unit of the SVG
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        box = (_LEFT / _WIDTH, _BOTTOM / _HEIGHT)
        axes = figure.add_axes((*box, 1 - box[0] - _RIGHT / _WIDTH, 1 - box[1] - _TOP / _HEIGHT))
        axes.patch.set_visible(False)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        _draw_lines(axes, chart)
        _scale(axes, chart, limit)
        low, high = axes.get_xlim()
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _cleaned(stream.getvalue(), chart, _zones(chart, low, high))


def _draw_lines(axes: Any, chart: Chart) -> None:
    for run, step in chart.marks:
        axes.axvline(step, color=_COLORS[run % NUM_COLORS], linewidth=1, linestyle=(0, (2, 3)), gid=f"run{run}")
    if chart.is_stack:
        colors = [_COLORS[line.color % NUM_COLORS] for line in chart.lines]
        axes.stackplot(
            chart.lines[0].steps, *(line.values for line in chart.lines), colors=colors, linewidth=0, alpha=0.85
        )
        return
    for line in chart.lines:
        color = _COLORS[line.color % NUM_COLORS]
        if line.low is not None:
            axes.fill_between(line.steps, line.low, line.high, color=color, alpha=0.18, lw=0, gid=f"run{line.run}")
        marker = {"marker": "o", "markersize": 3.5} if len(line.steps) <= 30 else {}
        axes.plot(line.steps, line.values, color=color, linewidth=1.6, gid=f"run{line.run}", **marker)
    if chart.level is not None:
        axes.axhline(chart.level[0], color=_INK, linewidth=1, linestyle=(0, (5, 3)))


def _scale(axes: Any, chart: Chart, limit: float | None) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    lowest = min(float((line.values if line.low is None else line.low).min()) for line in chart.lines)
    highest = max(float((line.values if line.high is None else line.high).max()) for line in chart.lines)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if chart.floor:
        if chart.is_stack:
            highest = float(np.sum([line.values for line in chart.lines], axis=0).max())
        top = max(highest, chart.level[0] if chart.level else 0.0)
        axes.set_ylim(0, limit or 1.05 * top or 1.0)
    elif lowest > 0 and highest / lowest > _LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest / lowest < 1000 else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))


def _tick(value: float, _: object) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _zones(chart: Chart, low: float, high: float) -> str:
    """Invisible stripes over the chart, whose titles are what a browser shows under the pointer."""
    steps = np.unique(np.concatenate([line.steps for line in chart.lines]))
    chosen = steps[np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MOST_ZONES)).astype(int))]
    scale = (_WIDTH - _LEFT - _RIGHT) / ((high - low) or 1.0)
    xs = _LEFT + (chosen - low) * scale
    edges = [_LEFT, *((xs[1:] + xs[:-1]) / 2).tolist(), _WIDTH - _RIGHT]
    found = []
    for number, step in enumerate(chosen.tolist()):
        said = [f"step {step:.0f}", *(_said(line, step, len(chart.lines) > 1) for line in chart.lines)]
        text = "\n".join(shown(one) for one in said if one)
        found.append(
            f'<rect class="zone" x="{edges[number]:.1f}" y="{_TOP:.0f}" '
            f'width="{edges[number + 1] - edges[number]:.1f}" height="{_HEIGHT - _TOP - _BOTTOM:.0f}">'
            f"<title>{text}</title></rect>"
        )
    return "".join(found)


def _said(line: Line, step: float, with_label: bool) -> str:
    at = int(np.abs(line.steps - step).argmin())
    reach = (line.steps[-1] - line.steps[0]) / max(1, len(line.steps) - 1)
    if abs(line.steps[at] - step) > max(reach, 1.0):
        return ""  # this run has no such step
    band = "" if line.low is None or line.high is None else f" ({line.low[at]:.4g} to {line.high[at]:.4g})"
    return f"{line.label + ': ' if with_label else ''}{line.values[at]:.5g}{band}"


def _cleaned(svg: str, chart: Chart, zones: str) -> str:
    """matplotlib's file as a part of a page: no header, no style of its own, the page's colours and font."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    head = f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{shown(chart.title)}">'
    svg = re.sub(r"<svg [^>]*>", lambda _: head, svg, count=1)
    svg = re.sub(r'<g id="(run\d+)">', r'<g class="\1">', svg)
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", svg)
    svg = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], svg)
    return svg.replace("</svg>", f"{zones}</svg>")


def legend(labels: Sequence[str]) -> str:
    """The runs' colours, each with a box that hides the run in all charts."""
    return "".join(
        f'<label><input type="checkbox" id="show{number}" checked><i style="background:var(--c{number % NUM_COLORS})">'
        f"</i>{shown(label)}</label>"
        for number, label in enumerate(labels)
    )
