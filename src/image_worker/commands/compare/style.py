"""How `compare`'s page looks: by day and by night, on a phone and on a desk, and on paper."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ground: #f3f4f7; --card: #fff; --ink: #1b1f2a;
  --soft: #545c6d; --line: #dde0e8; --accent: #2952d6; --bar: #6f8ae8; --bad: #b3261e;
  --sans: -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, system-ui, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
@media (prefers-color-scheme: dark) { :root { --ground: #101217; --card: #191c23; --ink: #e7e9ef;
  --soft: #a3abbb; --line: #2f3541; --accent: #a3b7ff; --bar: #5670cf; --bad: #ff9d92; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 var(--sans); }
main { max-width: 1160px; margin: 0 auto; padding: 24px 16px 48px; display: grid; gap: 20px; }
main > * { min-width: 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px;
  padding: 18px 18px 20px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; }
h2 { font-size: 18px; margin: 0 0 10px; }
h3 { font-size: 15px; margin: 0 0 4px; }
p { margin: 0 0 8px; max-width: 78ch; overflow-wrap: anywhere; }
.soft, figcaption, dt { color: var(--soft); font-size: 14px; }
.bad { color: var(--bad); }
ul { margin: 0; padding-left: 20px; }
li { margin: 0 0 6px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 6px; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td.wide { text-align: left; }
td.wide { white-space: normal; min-width: 240px; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr));
  gap: 24px 32px; }
.plot { display: block; width: 100%; max-width: 460px; height: auto; font: 13px var(--sans); }
.plot text { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
.plot .name { font-weight: 600; }
.plot .figure { text-anchor: end; }
.plot .tick { fill: var(--soft); font-size: 12px; }
.plot .grid { stroke: var(--line); }
.plot .bar { fill: var(--bar); }
.plot .interval { stroke: var(--bar); stroke-width: 8; stroke-linecap: round; opacity: .55; }
.plot .dot { fill: var(--card); stroke: var(--accent); stroke-width: 1.5; }
.plot .mark { stroke: var(--ink); stroke-width: 2.5; }
.legend { list-style: none; padding: 0; font-size: 14px; columns: 2; }
.swatch { display: inline-block; width: 14px; height: 14px; border-radius: 3px;
  margin-right: 8px; vertical-align: -2px; }
.part0 { fill: #4e79a7; background: #4e79a7; }
.part1 { fill: #f28e2b; background: #f28e2b; }
.part2 { fill: #e15759; background: #e15759; }
.part3 { fill: #76b7b2; background: #76b7b2; }
.part4 { fill: #59a14f; background: #59a14f; }
.part5 { fill: #edc948; background: #edc948; }
.part6 { fill: #b07aa1; background: #b07aa1; }
.part7 { fill: #ff9da7; background: #ff9da7; }
.part8 { fill: #9c755f; background: #9c755f; }
.part9 { fill: #8d8a86; background: #8d8a86; }
.pictures { display: grid; gap: 12px; margin: 10px 0 18px;
  grid-template-columns: repeat(auto-fill, minmax(min(46%, 180px), 1fr)); }
figure { margin: 0 0 10px; min-width: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 8px;
  border: 1px solid var(--line); background: var(--ground); }
figcaption { padding-top: 4px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(90px, max-content) 1fr; gap: 4px 16px;
  margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
pre, code { font: 13px/1.5 var(--mono); }
pre { margin: 0; padding: 12px; background: var(--ground); border-radius: 8px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
a { color: var(--accent); }
@media (max-width: 420px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } }
@media print { section { break-inside: avoid; } }
"""
