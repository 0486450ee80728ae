"""Renders a plan as stacked bars in one SVG file: memory by ZeRO stage, and seconds of a step by number of nodes."""

from collections.abc import Mapping, Sequence
from html import escape

from train.plan.plan_text import GIB, StagePlan

_WIDTH, _LABEL, _BAR, _GAP, _TITLE = 860, 150, 24, 10, 34
_COLOURS = {
    "weights": "#4269d0",
    "gradients": "#d6493f",
    "optimizer": "#3ca951",
    "activations: vision": "#9b6bd6",
    "activations: projector": "#d67aa8",
    "activations: language": "#e8912d",
    "logits and work": "#c9a227",
    "buffers": "#6cc5b0",
    "fragmentation": "#8a94a6",
    "vision": "#9b6bd6",
    "language": "#e8912d",
    "attention": "#c9a227",
    "head": "#a98467",
    "recompute": "#d67aa8",
    "balance": "#d6493f",
    "communication": "#4269d0",
    "input": "#6cc5b0",
    "save": "#8a94a6",
}
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1c2128}.h{font-weight:600;font-size:14px}.faint{fill:#667080}"
    ".limit{stroke:#b3261e;stroke-width:1.5;stroke-dasharray:5 3}.paper{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e3e6ea}.faint{fill:#98a2b0}.paper{fill:#15181c}.limit{stroke:#ff8a7a}}"
)


def render_bar_chart(plans: Sequence[StagePlan]) -> str:
    """Returns an SVG with the charts of all stages, one below the other."""
    body, y = [], 8
    for plan in plans:
        name = plan.planner.config.stage.name
        bars = {label: dict(estimate.memory.kinds) for label, estimate in plan.variants.items()}
        scaled = {label: {kind: value / GIB for kind, value in kinds.items()} for label, kinds in bars.items()}
        part, y = _render_chart(f"{name}: GiB per rank", scaled, y, limit=plan.requested.limit_bytes / GIB)
        body.append(part)
        seconds = {f"{e.settings.nodes} node(s)": dict(e.time.kinds) for e in plan.advice.nodes}
        part, y = _render_chart(f"{name}: seconds per step", seconds, y)
        body.append(part)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" height="{y}" '
        f'role="img"><style>{_STYLE}</style><rect class="paper" width="100%" height="100%"/>{"".join(body)}</svg>\n'
    )


def _render_chart(
    title: str, bars: Mapping[str, Mapping[str, float]], top: int, limit: float | None = None
) -> tuple[str, int]:
    """Renders one chart of horizontal bars with its legend.

    Args:
        top: y coordinate of the chart, in pixels.
        limit: drawn as a vertical line.

    Returns:
        The SVG elements, and the y coordinate of the next chart.
    """
    kinds = [kind for kind in dict.fromkeys(k for bar in bars.values() for k in bar) if _find_largest(bars, kind) > 0]
    most = max([sum(bar.values()) for bar in bars.values()] + ([limit] if limit else [])) or 1.0
    scale = (_WIDTH - _LABEL - 80) / most
    parts = [f'<text class="h" x="8" y="{top + 18}">{escape(title)}</text>']
    y = top + _TITLE
    for label, bar in bars.items():
        parts.append(f'<text x="{_LABEL - 8}" y="{y + 16}" text-anchor="end">{escape(label)}</text>')
        x = float(_LABEL)
        for kind in kinds:
            width = bar.get(kind, 0.0) * scale
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{_COLOURS[kind]}">'
                f"<title>{escape(kind)}: {bar.get(kind, 0.0):.3g}</title></rect>"
            )
            x += width
        parts.append(f'<text class="faint" x="{x + 6:.1f}" y="{y + 16}">{sum(bar.values()):.3g}</text>')
        y += _BAR + _GAP
    if limit:
        x = _LABEL + limit * scale
        parts.append(f'<path class="limit" d="M{x:.1f} {top + _TITLE - 6}V{y}"/>')
        parts.append(f'<text class="faint" x="{x:.1f}" y="{top + 22}" text-anchor="end">available: {limit:.3g}</text>')
    legend, y = _render_legend(kinds, y + 4)
    return "".join(parts) + legend, y + 14


def _render_legend(kinds: Sequence[str], y: int) -> tuple[str, int]:
    parts, x = [], _LABEL
    for kind in kinds:
        width = 26 + 7 * len(kind)
        if x + width > _WIDTH - 8:
            x, y = _LABEL, y + 20
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 17}" y="{y + 11}">{escape(kind)}</text>')
        x += width
    return "".join(parts), y + 16


def _find_largest(bars: Mapping[str, Mapping[str, float]], kind: str) -> float:
    return max(bar.get(kind, 0.0) for bar in bars.values())
