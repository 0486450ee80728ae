"""What a report adds to the style of `train.inspect`: colours of lines, the charts' grid, boxes that hide runs."""

from train.html.stylesheet import STYLE as PAGE_STYLE

_MOST_HIDDEN = 32
"""Runs beyond that are drawn and cannot be hidden."""
_HIDING = "\n".join(
    f"body:has(#show{number}:not(:checked)) .run{number} {{ display: none; }}" for number in range(_MOST_HIDDEN)
)

STYLE = (
    PAGE_STYLE
    + """
:root {
  --c0: #2f6db3; --c1: #d1662a; --c2: #2f8f5b; --c3: #b23a6b; --c4: #7a57b8; --c5: #8a7a1f; --c6: #1f8f99;
  --c7: #a0522d; --c8: #5b6b7a; --c9: #c23b3b;
}
@media (prefers-color-scheme: dark) { :root {
  --c0: #74aef0; --c1: #f39a62; --c2: #6fcf97; --c3: #f080ae; --c4: #b69af0; --c5: #d8c662; --c6: #62cfd9;
  --c7: #d99a77; --c8: #a5b4c2; --c9: #f28080;
} }
.plots { display: grid; gap: 1rem 1.6rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
.plot h3 { font-size: .95rem; }
.plot svg { width: 100%; overflow: visible; }
.plot svg * { stroke-linejoin: round; stroke-linecap: butt; }
.plot text { font-family: system-ui, sans-serif; }
.zone { fill: transparent; }
.zone:hover { fill: var(--ink); fill-opacity: .07; }
.runs label { display: inline-flex; align-items: baseline; margin-right: 1.2em; cursor: pointer; }
.runs i { flex: none; width: .9em; height: .9em; vertical-align: -.1em; margin: 0 .35em; }
.shots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.shots article { margin: 0; }
.shots img { display: block; max-width: 100%; height: auto; margin: .4rem 0; }
.shots dl.facts { font-size: .92rem; grid-template-columns: fit-content(38%) 1fr; }
.shots dd { white-space: pre-wrap; }
pre { font: .82rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
table { width: max-content; }
td { max-width: 24rem; overflow-wrap: break-word; }
.differs td:first-child { color: var(--faint); }
"""
    + _HIDING
)
