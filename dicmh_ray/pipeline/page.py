"""A summary as one HTML file: inline style and SVG, no script, nothing loaded from anywhere.

Keys, errors and addresses come from the collection: every text is escaped, and the page's own policy
forbids scripts and requests.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from typing import Any, NamedTuple

from dicmh_ray.pipeline.chart import Series, aligned, bins_shown, clipped, histogram_figure
from dicmh_ray.pipeline.encode import (
    BELOW_FLOOR,
    DAMAGED_SOURCE,
    ENCODE_FAILED,
    FAILURE_CAUSES,
    LARGER_THAN_SOURCE,
    TAG_FAILED,
    UNDECODABLE,
    WRONG_SIZE,
)
from dicmh_ray.pipeline.loading import CRASH, UNREADABLE, UNSUPPORTED
from dicmh_ray.pipeline.report import JobReport, Tally
from dicmh_ray.pipeline.summary import WorstImage

MEANING = {
    UNREADABLE: "The bytes are no image, or a damaged, cut-off or too large one.",
    UNSUPPORTED: "A sound image of a kind the codec does not serve: alpha, 16-bit, CMYK, animated.",
    ENCODE_FAILED: "The codec raised an error on this image alone.",
    TAG_FAILED: "The tagger raised an error on this image alone.",
    CRASH: "A worker process died on this image, twice, alone.",
    DAMAGED_SOURCE: "The container ends in damage; what follows in it is lost to the archive.",
    WRONG_SIZE: "No size, or a wrong one, was given for an official file.",
    UNDECODABLE: "An official file that the codec cannot decode.",
    BELOW_FLOOR: "The decode misses the quality floor: the original is kept instead.",
    LARGER_THAN_SOURCE: "The stream would be no smaller than the source: the original is kept.",
}
"""What each cause says, in a sentence."""

PSNR_SHOWN_TO = 60.0
"""dB; better pictures share the last column, or one identical picture would stretch the axis."""


class Thumbnail(NamedTuple):
    """A small picture of an image, as a ``data:`` address."""

    caption: str
    address: str


@dataclass(frozen=True, kw_only=True)
class PageFacts:
    """What a page is made of."""

    archive: str
    is_complete: bool
    codec_id: str
    tally: Tally
    version: int | None = None
    """Of the archive."""

    units: tuple[int, int] = (0, 0)
    """Committed, and in all."""

    job: JobReport | None = None
    """Of the run that made it, where the page is that run's."""

    error: str | None = None
    """Why the run ended early."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The plan's: policy and source options."""

    thumbnails: Mapping[str, Sequence[Thumbnail]] = field(default_factory=dict)
    """Of worst images, by key."""

    created_by: str = "dicmh_ray"


def render_page(facts: PageFacts) -> str:
    """The file's text."""
    title = f"{facts.archive} - {'job' if facts.job else 'archive'} report"
    body = "".join(
        [
            _header(facts),
            _tiles(facts),
            _status_bar(facts.tally),
            _charts(facts.tally),
            _causes(facts.tally),
            _worst(facts.tally.summary.worst, facts.thumbnails),
            _job(facts.job) if facts.job else "",
            _parameters(facts),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _header(facts: PageFacts) -> str:
    state, look = ("complete", "good") if facts.is_complete else ("unfinished", "bad")
    version = "" if facts.version is None else f" &middot; version {facts.version}"
    done, total = facts.units
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    error = f'<p class="error">{escape(facts.error)}</p>' if facts.error else ""
    return (
        f"<header><p class=kicker>{'Job' if facts.job else 'Archive'} report</p>"
        f"<h1>{escape(facts.archive)}</h1>"
        f'<p><span class="chip {look}">{state}</span> {done:,} of {total:,} units{version}'
        f" &middot; codec <code>{escape(facts.codec_id[:16])}</code>"
        f" &middot; {escape(facts.created_by)} &middot; {now}</p>{error}</header>"
    )


def _tiles(facts: PageFacts) -> str:
    tally = facts.tally
    share = tally.bytes_saved / tally.bytes_in if tally.bytes_in else 0.0
    ratio = tally.bytes_in / tally.bytes_out if tally.bytes_out else 0.0
    tiles = [
        ("Images", f"{tally.images:,}", f"{tally.ok:,} with a stream"),
        ("Source", _bytes(tally.bytes_in), "bytes of the images"),
        ("Archive", _bytes(tally.bytes_out), f"{ratio:.2f} : 1, all columns"),
        ("Saved", f"{share:.0%}", _bytes(tally.bytes_saved)),
        ("Mean rate", _optional(tally.mean_bpp, "{:.3f} bpp"), "all bits over all pixels"),
        ("Mean PSNR", _optional(tally.mean_psnr, "{:.2f} dB"), "of images with a stream"),
    ]
    return "<section class=tiles>{}</section>".format(
        "".join(
            f"<div class=tile><span>{name}</span><b>{escape(value)}</b><small>{escape(note)}</small>"
            "</div>"
            for name, value, note in tiles
        )
    )


def _status_bar(tally: Tally) -> str:
    counts = (
        ("ok", "stream", tally.ok),
        ("kept", "original kept", tally.kept_original),
        ("failed", "failed", tally.failed),
    )
    total = max(1, tally.images)
    x = 0.0
    bars, legend = [], []
    for look, name, count in counts:
        width = 1000 * count / total
        bars.append(f'<rect class={look} x="{x:.2f}" width="{width:.2f}" height="18"/>')
        x += width
        legend.append(
            f"<li><i class={look}></i>{name} <b>{count:,}</b> ({_percent(count, total)})</li>"
        )
    return (
        '<section class=status><svg viewBox="0 0 1000 18" preserveAspectRatio="none" role="img" '
        f'aria-label="status of all images">{"".join(bars)}</svg><ul>{"".join(legend)}</ul></section>'
    )


def _charts(tally: Tally) -> str:
    found = tally.summary.histograms
    streams = {"look": "ok", "name": "streams"}
    bpp, psnr, states = found["bpp"], found["psnr"], found["states"]
    charts = [
        histogram_figure(
            "Rate",
            "bits per pixel",
            [Series(columns=bpp.columns(bins_shown(bpp)), **streams)],
            label=_short,
            median=bpp.quantile(0.5),
        ),
        histogram_figure(
            "Quality",
            "PSNR, dB",
            [Series(columns=clipped(psnr.columns(bins_shown(psnr)), PSNR_SHOWN_TO), **streams)],
            label=lambda edge: f"{edge:.0f}{'+' if edge >= PSNR_SHOWN_TO else ''}",
            median=psnr.quantile(0.5),
        ),
        histogram_figure(
            "Sizes",
            "bytes of an image",
            aligned(source=found["source_bytes"], ok=found["stream_bytes"]),
            label=lambda edge: _bytes(edge).replace(" ", ""),
        ),
        histogram_figure(
            "States",
            "states written",
            [Series(columns=states.columns(range(1, max(states.bins, default=0) + 1)), **streams)],
            label=lambda edge: f"{edge:.0f}",
            is_discrete=True,
        ),
    ]
    return f"<section><h2>Distributions</h2><div class=charts>{''.join(charts)}</div></section>"


def _causes(tally: Tally) -> str:
    if not tally.causes:
        return "<section><h2>Images without a stream</h2><p class=none>There is none.</p></section>"
    rows = []
    for cause, count in sorted(tally.causes.items(), key=lambda item: (-item[1], item[0])):
        is_failure = cause in FAILURE_CAUSES
        examples = "".join(
            f"<li><code>{escape(example.key)}</code> {escape(example.error.partition(': ')[2])}</li>"
            for example in tally.summary.examples.get(cause, [])
        )
        rows.append(
            f"<tr><td><b>{escape(cause)}</b>"
            f'<br><span class="chip {"bad" if is_failure else "plain"}">'
            f"{'failure' if is_failure else 'by policy'}</span></td>"
            f"<td class=n>{count:,}<br><small>{_percent(count, tally.images)}</small></td>"
            f"<td>{escape(MEANING.get(cause, ''))}<ul class=examples>{examples}</ul></td></tr>"
        )
    return (
        "<section><h2>Images without a stream</h2><div class=wide><table><thead><tr><th>Cause<th class=n>Images"
        f"<th>Meaning and first examples</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "</section>"
    )


def _worst(worst: Sequence[WorstImage], thumbnails: Mapping[str, Sequence[Thumbnail]]) -> str:
    if not worst:
        return ""
    rows = []
    for image in worst:
        pictures = "".join(
            f'<figure class=thumb><img alt="" src="{escape(one.address)}">'
            f"<figcaption>{escape(one.caption)}</figcaption></figure>"
            for one in thumbnails.get(image.key, ())
        )
        rows.append(
            "<tr>"
            + (f"<td class=pictures>{pictures}</td>" if thumbnails else "")
            + f"<td class=key><code>{escape(image.key)}</code></td>"
            f"<td class=n>{image.psnr:.2f}</td>"
            f"<td class=n>{_optional(image.worst_tile_psnr, '{:.2f}')}</td>"
            f"<td class=n>{_optional(image.bpp, '{:.3f}')}</td>"
            f"<td class=n>{_optional(image.num_states, '{}')}</td></tr>"
        )
    first = "<th>Picture" if thumbnails else ""
    return (
        "<section><h2>Lowest PSNR among the streams</h2><div class=wide><table><thead><tr>"
        f"{first}<th>Key<th class=n>PSNR dB<th class=n>Worst tile dB<th class=n>bpp"
        f"<th class=n>States</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _job(report: JobReport) -> str:
    seconds = report.unit_seconds
    quantiles = ", ".join(
        f"{name} {_optional(seconds.quantile(share), '{:.1f}')} s"
        for name, share in (("50 % below", 0.5), ("90 % below", 0.9), ("99 % below", 0.99))
    )
    facts = [
        ("Runtime", f"{report.runtime}, {_counted(report.workers, 'worker')}"),
        ("Time", f"{report.seconds:,.1f} s, processor time of workers {report.cpu_seconds:,.1f} s"),
        (
            "Speed",
            f"{report.images_per_s:.2f} images/s, {report.bytes_in_per_s / 1e6:.2f} MB/s read",
        ),
        ("Units", f"{report.units_done:,} done, {report.units_resumed:,} were done before"),
        ("Seconds a unit", quantiles),
        ("Retries", _counted(report.units_retried, "unit") + " tried again"),
        ("Deaths", _counted(report.workers_died, "worker") + " died in a unit"),
    ]
    if report.units_failed:
        names = ", ".join(report.units_failed[:20])
        facts.append(("Units given up", f"{len(report.units_failed):,}: {names}"))
    rows = "".join(f"<tr><th>{name}<td>{escape(value)}</tr>" for name, value in facts)
    return f"<section><h2>This run</h2><div class=wide><table class=facts><tbody>{rows}</tbody></table></div></section>"


def _parameters(facts: PageFacts) -> str:
    text = json.dumps(dict(facts.parameters), indent=2, ensure_ascii=False)
    over = facts.tally.summary.over_max_bytes
    note = f"<p>{over:,} streams of one state are longer than max_bytes.</p>" if over else ""
    return (
        f"<section>{note}<details><summary>Policy and source options</summary>"
        f"<pre>{escape(text)}</pre></details></section>"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def _percent(count: int, total: int) -> str:
    share = 100 * count / max(1, total)
    return f"{share:.1f} %" if share >= 0.1 or not count else "< 0.1 %"


def _optional(value: float | None, form: str) -> str:
    return "&ndash;" if value is None else form.format(value)


def _bytes(count: float) -> str:
    sign, count = ("-", -count) if count < 0 else ("", count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            digits = ".0f" if count >= 100 or unit == "B" else ".3g"
            return f"{sign}{count:{digits}} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


_STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b2330;--dim:#5d6a7c;--line:#dfe4ea;
--ok:#2f6fde;--source:#b3bfce;--kept:#e0a526;--failed:#cf3d3d;--good:#1c7d4d;--goodbg:#dff3e8;
--badbg:#fbe3e3;--plainbg:#eceff3}
@media(prefers-color-scheme:dark){:root{--bg:#12161d;--card:#1a202a;--ink:#e6eaf0;--dim:#97a3b4;
--line:#2c3542;--ok:#6a9cf5;--source:#46536a;--kept:#e5b34a;--failed:#ef7070;--good:#7ad6a5;
--goodbg:#16382a;--badbg:#451f22;--plainbg:#262e3a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",sans-serif}
main{max-width:1040px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;line-height:1.25;margin:2px 0 8px;overflow-wrap:anywhere}
h2{font-size:17px;margin:34px 0 12px}
p{margin:6px 0}
code{font:13px ui-monospace,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
small,.kicker,header p{color:var(--dim)}
.kicker{text-transform:uppercase;letter-spacing:.08em;font-size:12px;margin:0}
.chip{display:inline-block;border-radius:9px;padding:0 9px;font-size:12px;font-weight:600;
white-space:nowrap}
.good{background:var(--goodbg);color:var(--good)}.bad{background:var(--badbg);color:var(--failed)}
.plain{background:var(--plainbg);color:var(--dim)}
.error{background:var(--badbg);color:var(--failed);border-radius:8px;padding:8px 12px}
header .error{color:var(--failed)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:20px}
.tile,figure,.wide{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:12px 14px;display:flex;flex-direction:column}
.tile span{color:var(--dim);font-size:13px}.tile b{font-size:22px;font-weight:650;line-height:1.35}
.status{margin-top:16px}.status svg{display:block;width:100%;height:14px;border-radius:7px}
.status ul{list-style:none;display:flex;flex-wrap:wrap;gap:4px 22px;margin:8px 0 0;padding:0;font-size:14px}
i{display:inline-block;width:10px;height:10px;border-radius:3px;margin:0 6px 0 8px}
.status i{margin-left:0}
i.ok{background:var(--ok)}i.source{background:var(--source)}i.kept{background:var(--kept)}
i.failed{background:var(--failed)}
rect.ok{fill:var(--ok)}rect.source{fill:var(--source)}rect.kept{fill:var(--kept)}
rect.failed{fill:var(--failed)}
.charts rect.ok{fill-opacity:.88}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:14px}
figure{margin:0;padding:12px 12px 6px}figcaption{font-weight:600;margin:0 4px 6px}
figcaption small{font-weight:400;margin-left:8px}
figure svg{display:block;width:100%;height:auto}
svg text{fill:var(--dim);font-size:11px;text-anchor:middle}svg text.y{text-anchor:end}
svg .grid{stroke:var(--line)}svg .axis{stroke:var(--dim);stroke-width:1}
svg .median{stroke:var(--ink);stroke-dasharray:3 3;stroke-opacity:.6}
.wide{overflow-x:auto}table{width:100%;border-collapse:separate;border-spacing:0}
th,td{text-align:left;vertical-align:top;padding:9px 12px;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
thead th{font-size:13px;color:var(--dim);font-weight:600}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.facts th{width:170px;font-weight:600;color:var(--dim)}
.examples{margin:4px 0 0;padding-left:18px;font-size:13px;color:var(--dim)}
.examples code{color:var(--ink)}
.key{min-width:9em}.pictures{white-space:nowrap;width:1%}
.thumb{display:inline-block;border:0;padding:0;margin:0 8px 0 0;background:none;vertical-align:top}
.thumb img{display:block;max-width:150px;max-height:110px;border-radius:6px}
.thumb figcaption{font-weight:400;font-size:12px;color:var(--dim);margin:2px 0 0}
.none{color:var(--dim)}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px;overflow:auto;
font:13px/1.45 ui-monospace,"DejaVu Sans Mono",monospace}
details{margin-top:16px}summary{cursor:pointer;color:var(--dim)}
@media print{body{background:#fff}.tile,figure,tr{break-inside:avoid}}
"""
