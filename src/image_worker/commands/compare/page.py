"""`index.html` of `compare`: one page that needs nothing from elsewhere. All texts are escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from image_worker.commands.compare import card_section, pictures
from image_worker.commands.compare.plots import Line, plot
from image_worker.commands.compare.style import STYLE
from image_worker.commands.compare.words import (
    TITLES,
    decibels,
    gib,
    likeness,
    notes,
    number,
    row,
    sentence,
)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_GIB = 2**30


def page(results: Mapping[str, Any], job: Mapping[str, Any], out: Path) -> str:
    """The whole page. job: its input, for its pictures; out: where the ways' pictures are."""
    sections = [
        ("In short", _summary(results)),
        ("Figures", _table(results)),
        ("Plots", _plots(results["ways"])),
        ("Pictures", _pictures(results, out)),
        ("Starts", _starts(results["ways"])),
        ("Where the card's time goes", card_section.times(results["ways"])),
        ("Fused kernels", card_section.kernels(results["kernels"])),
        ("The job", _job(results, job)),
        ("Machine and settings", _machine(results)),
        ("Once more", f"<pre>{escape(results['command'])}</pre>"),
    ]
    body = "".join(
        f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content
    )
    state = "" if results["complete"] else '<p class="bad">Not complete: runs are missing.</p>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<link rel="icon" href="data:,">'
        f"<title>{_title(results)}</title><style>{STYLE}</style></head>"
        f"<body><main><header><h1>{_title(results)}</h1>{state}</header>{body}</main></body></html>\n"
    )


def _title(results: Mapping[str, Any]) -> str:
    return escape("Compared: " + ", ".join(way["name"] for way in results["ways"]))


def _summary(results: Mapping[str, Any]) -> str:
    ways = results["ways"]
    items = [f"<li><b>{escape(w['name'])}</b>: {escape(sentence(w, ways))}</li>" for w in ways]
    return f"<ul>{''.join(items)}</ul>"


def _table(results: Mapping[str, Any]) -> str:
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in TITLES)
    lines = "".join(map(_line, results["ways"]))
    told = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes(results))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Figures"><table>'
        f"<caption>Seconds, GiB, and likeness of pictures</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div><br>{told}"
    )


def _line(way: Mapping[str, Any]) -> str:
    name, *cells = row(way)
    begin = f'<tr><th scope="row">{escape(name)}</th>'
    if way["error"] and not way["seconds"]:
        return f'{begin}<td class="wide bad" colspan="{len(cells)}">{escape(cells[0])}</td></tr>'
    return begin + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _plots(ways: Sequence[Mapping[str, Any]]) -> str:
    measured = [way for way in ways if way["seconds"]]
    seconds = [
        Line(
            way["name"],
            f"{number(way['seconds']['median'])} s",
            dots=way["seconds"]["values"],
            interval=(way["seconds"]["low"], way["seconds"]["high"]),
            mark=way["seconds"]["median"],
        )
        for way in measured
    ]
    compared = [way for way in measured if way["against"]]
    found = [
        ("Seconds per picture", plot("Seconds per picture", "s", seconds, from_zero=True)),
        ("Peak memory of the card", _memory(measured, "card")),
        ("Peak memory of the host", _memory(measured, "host")),
        ("PSNR of each seed's picture", _likenesses(compared, "psnr", "dB", decibels)),
        ("SSIM of each seed's picture", _likenesses(compared, "ssim", "", likeness)),
    ]
    parts = [f"<div><h3>{title}</h3>{drawn}</div>" for title, drawn in found if drawn]
    if not parts:
        return ""
    legend = "A dot is a run, or a seed; the upright line the median; the band its interval."
    return f'<p class="soft">{legend}</p><div class="plots">{"".join(parts)}</div>'


def _memory(ways: Sequence[Mapping[str, Any]], what: str) -> str:
    lines = [
        Line(way["name"], f"{gib(way[what])} GiB", bar=way[what] / _GIB)
        for way in ways
        if way[what] is not None
    ]
    return plot(f"Peak memory of the {what}", "GiB", lines)


def _likenesses(ways: Sequence[Mapping[str, Any]], what: str, unit: str, words: Any) -> str:
    lines = []
    for way in ways:
        values = [one[what] for one in way["pictures"] if one[what] is not None]
        figure = f"{words(way)} {unit}".strip()
        if any(one["same"] for one in way["pictures"]) and what == "psnr":
            figure += " (∞: the same)"
        lines.append(Line(way["name"], figure, dots=values))
    return plot(f"{what.upper()} to {ways[0]['against']}" if ways else "", unit, lines)


def _pictures(results: Mapping[str, Any], out: Path) -> str:
    figures = pictures.samples(results, out)
    if not figures:
        return ""
    times = pictures.AMPLIFIED
    return (
        f'<p class="soft">Reduced; whole ones are in the folder <code>pictures</code>. Under a '
        f"way's picture is where it differs: each channel's absolute difference, {times} times, "
        f"so black is the same, and white at least {-(-255 // times)} levels of 255 apart.</p>"
        f"{figures}"
    )


def _starts(ways: Sequence[Mapping[str, Any]]) -> str:
    items = []
    for way in ways:
        if way["start"]:
            steps = ", ".join(f"{s['name']} {s['seconds']:.2f}" for s in way["start"]["steps"])
            text = f"{number(way['start']['seconds'])} s ({steps}); {way['start']['plan']}"
            items.append(f"<li><b>{escape(way['name'])}</b>: {escape(text)}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _job(results: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    found = results["job"]
    facts = {"prompt": found["prompt"], "pictures": str(found["pictures"])}
    facts |= {name: str(value) for name, value in found["options"].items()}
    facts["seeds"] = ", ".join(map(str, dict.fromkeys(results["seeds"])))
    for way in results["ways"]:
        if way["size"]:
            facts["result"] = f"{way['size'][0]}x{way['size'][1]}"
    facts |= {
        f"steps of {way['name']}": str(way["steps"]) + "".join(f"; {w}" for w in way["warnings"])
        for way in results["ways"]
        if way["steps"]
    }
    return _facts(facts) + pictures.given(job)


def _machine(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    card = machine["card"]
    facts = {
        "card": "none"
        if card is None
        else f"{card['name']}, {card['memory'] / _GIB:.1f} GiB, compute capability "
        f"{card['capability']}, driver {card['driver'] or 'unknown'}",
        "processor": f"{machine['processor']}, {machine['threads']} threads",
        "host": f"{machine['host_memory'] / _GIB:.1f} GiB, {machine['system']}",
        "versions": ", ".join(f"{name} {which}" for name, which in machine["versions"].items()),
        "code": f"sources {results['code']}",
    }
    for way in results["ways"]:
        settings = " ".join(f"{name}={value}" for name, value in way["settings"].items())
        loras = f"; LoRAs: {', '.join(way['loras'])}" if way["loras"] else ""
        facts[way["name"]] = (settings or "defaults") + loras
    return _facts(facts)


def _facts(facts: Mapping[str, str]) -> str:
    lines = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{''.join(lines)}</dl>"
