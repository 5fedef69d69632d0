"""The page's sections on the card: where its time goes, and kernels against their references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from image_worker.commands.compare.card_time import NAMES
from image_worker.commands.compare.plots import Line, plot


def times(ways: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of one picture by what kernels do; nothing where no way has them."""
    watched = [way for way in ways if way["card_time"]]
    measured = {
        way["name"]: {part["name"]: part["ms"] for part in way["card_time"]["parts"]}
        for way in watched
        if "parts" in way["card_time"]
    }
    problems = "".join(
        f"<p>{escape(way['name'])}: not measured: {escape(way['card_time']['problem'])}.</p>"
        for way in watched
        if "problem" in way["card_time"]
    )
    if not measured:
        return problems
    lines = [
        Line(name, f"{sum(parts.values()):.0f} ms", parts=[parts.get(one, 0.0) for one in NAMES])
        for name, parts in measured.items()
    ]
    told = (
        "One picture, from its prompt to its pixels, watched by torch's profiler. Copies beside "
        "other work count, too, so the sum can be more than the picture took."
    )
    drawn = plot("Milliseconds of the card by what it does", "ms", lines)
    return (
        f'<p class="soft">{told}</p><div class="plots"><div>{drawn}</div><div>{_legend()}</div>'
        f"</div>{_times_table(measured)}{problems}"
    )


def kernels(found: Mapping[str, Any]) -> str:
    """Each fused kernel, its definition in plain torch, and their ratio."""
    if "problem" in found:
        return f"<p>Not measured: {escape(found['problem'])}.</p>"
    lines = []
    for pair in found["pairs"]:
        name = f'<tr><th scope="row">{escape(pair["name"])}</th>'
        if "problem" in pair:
            lines.append(f'{name}<td class="wide" colspan="3">{escape(pair["problem"])}</td></tr>')
            continue
        share = pair["fused"] / pair["reference"]
        cells = (f"{pair['fused']:.3f}", f"{pair['reference']:.3f}", f"{share:.0%}")
        lines.append(name + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    caption = (
        "One call on the shapes of a usual job, in bf16; medians by CUDA's clock. Plain torch is "
        "the operation's definition, not the fastest way without a kernel."
    )
    titles = ("operation", "kernel, ms", "in plain torch, ms", "share")
    return _table("Fused kernels", caption, titles, lines)


def _legend() -> str:
    items = "".join(
        f'<li><span class="swatch part{number}"></span>{escape(name)}</li>'
        for number, name in enumerate(NAMES)
    )
    return f'<ul class="legend">{items}</ul>'


def _times_table(measured: Mapping[str, Mapping[str, float]]) -> str:
    lines = []
    for name in NAMES:
        if any(parts.get(name) for parts in measured.values()):
            cells = "".join(f"<td>{_cell(parts, name)}</td>" for parts in measured.values())
            lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    caption = "Milliseconds, and their share of the way's sum"
    return _table("Where the card's time goes", caption, ("what it does", *measured), lines)


def _cell(parts: Mapping[str, float], name: str) -> str:
    if not parts.get(name):
        return ""
    return f"{parts[name]:.1f} ({parts[name] / sum(parts.values()):.0%})"


def _table(label: str, caption: str, titles: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
