"""How the page looks, in light and in dark, on a wide screen and on a phone."""

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c2128; --faint: #667080; --line: #d8dde4; --paper: #fff; --card: #f7f8fa; --accent: #b3261e; --bar: #7f95b5;
  --answer: #c9ecd2; --special: #e8e2f7; --picture: #dbe8fa; --loss: 214 60 40;
}
@media (prefers-color-scheme: dark) { :root {
  --ink: #e3e6ea; --faint: #98a2b0; --line: #3a414b; --paper: #15181c; --card: #1d2126; --accent: #ff8a7a;
  --bar: #61789a; --answer: #1f4d31; --special: #3d3360; --picture: #23405f; --loss: 235 90 70;
} }
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 78rem; font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
  color: var(--ink); background: var(--paper);
}
h1 { font-size: 1.35rem; margin: .2rem 0 .6rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0; }
a { color: inherit; }
p { margin: .3rem 0; }
figure { margin: 0; max-width: 100%; }
svg { display: block; max-width: 100%; height: auto; }
details { margin: .3rem 0; }
summary { cursor: pointer; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dl.facts dt { color: var(--faint); }
dl.facts dd { margin: 0; }
.note { border-left: 4px solid var(--accent); padding: .3rem .8rem; background: var(--card); margin: .6rem 0; }
.faint, figcaption, .chips { color: var(--faint); font-size: .85rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: normal; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.charts, .views { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.chart { width: 17rem; }
.chart svg { width: 100%; }
.chart text { font-size: 11px; fill: var(--faint); }
.chart .end { text-anchor: end; }
.bar, .dot { fill: var(--bar); }
.here { fill: var(--accent); }
.axis { stroke: var(--line); fill: none; }
.marks { stroke: var(--accent); stroke-width: 1.2; }
.line { fill: none; stroke: var(--bar); }
.key span { white-space: nowrap; margin-right: .7em; }
.key i { display: inline-block; width: .9em; height: .9em; vertical-align: -.1em; margin-right: .3em; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; margin: 1rem 0; }
.chips { margin: .1rem 0 .5rem; }
.views { margin: .6rem 0; }
figcaption { margin-top: .2rem; }
.tiles { display: grid; gap: 4px; max-width: 100%; }
.overlay { transition: opacity .15s; }
svg:hover > .overlay { opacity: .1; }
.dropped { fill: #e0261a; fill-opacity: .5; fill-rule: evenodd; }
.edge { fill: none; stroke: #ffd400; stroke-dasharray: 5 3; }
.cuts { fill: none; stroke: #fff; stroke-width: 1.5; }
.cuts.back { stroke: #000; stroke-width: 3.5; stroke-opacity: .6; }
.edge, .cuts { vector-effect: non-scaling-stroke; }
.prompt {
  white-space: pre-wrap; unicode-bidi: isolate; font-size: .95rem;
  border-top: 1px solid var(--line); padding-top: .5rem;
}
.prompt mark { background: var(--answer); color: inherit; border-radius: 2px; }
.special { background: var(--special); border-radius: 3px; font: .85em ui-monospace, monospace; padding: 0 .15em; }
mark .special { outline: 2px solid var(--answer); }
.picture { background: var(--picture); border-radius: 3px; padding: 0 .35em; font-size: .9em; }
.turn, .break { color: var(--faint); user-select: none; }
.turn { font-size: .75em; border: 1px solid var(--line); border-radius: 3px; padding: 0 .3em; margin: 0 .2em; }
.t { background: rgb(var(--loss) / var(--a)); }
.t .special { background: none; }
.miss { text-decoration: underline dotted var(--accent); }
"""
