"""`librobot-data inspect`: a dataset on one self-contained page, to be looked at before training on it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from librobot import __version__
from librobot.data.check import Finding, check
from librobot.data.images import resize_with_padding
from librobot.data.sources.base import Source
from librobot.data.statistics import vector_statistics
from librobot.errors import LibrobotError
from librobot.progress import ProgressBar
from librobot.types import Dim

VIDEO_HEIGHT = 240
MOST_FRAMES = 300
"""Of an episode's video: longer ones show every n-th frame, at the real speed."""
COLUMNS = ("mean", "std", "min", "q01", "q50", "q99", "max")
STATE, ACTION = "#2563eb", "#ea580c"

STYLE = """
:root{--ink:#1f2937;--soft:#6b7280;--line:#e5e7eb;--wash:#f9fafb}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);max-width:1180px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.6rem 0 .3rem}p.note,figcaption,.soft{color:var(--soft);font-size:.85rem}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .7rem;border-bottom:1px solid var(--line);text-align:right}
td:first-child,th:first-child,td.text{text-align:left}.wide{overflow-x:auto}
.facts{display:flex;flex-wrap:wrap;gap:.4rem 2rem;margin:.8rem 0}.facts b{display:block;font-size:1.2rem}
.bad{background:#fef2f2;border-left:4px solid #dc2626;padding:.3rem .8rem;margin:.3rem 0;font-size:.9rem}
.good{background:#f0fdf4;border-left:4px solid #16a34a;padding:.3rem .8rem}
.videos{display:flex;flex-wrap:wrap;gap:.8rem}figure{margin:0}video{height:240px;background:#000;border-radius:6px}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(270px,1fr));gap:.6rem;margin-top:.6rem}
.plot{background:var(--wash);border:1px solid var(--line);border-radius:6px;padding:.3rem .5rem}
.plot svg{width:100%;height:80px;display:block}.plot svg *{vector-effect:non-scaling-stroke}
.plot polyline{fill:none;stroke-width:1.5}.plot .range{float:right;color:var(--soft);font-size:.75rem}
.key i{display:inline-block;width:1rem;height:3px;vertical-align:middle;margin:0 .3rem 0 .8rem}
"""
SCRIPT = """
for (const episode of document.querySelectorAll('section.episode')) {
  const videos = [...episode.querySelectorAll('video')], lines = episode.querySelectorAll('line.now');
  const first = videos[0];
  if (!first) continue;
  const show = () => {
    const at = 300 * first.currentTime / (first.duration || 1);
    for (const line of lines) { line.setAttribute('x1', at); line.setAttribute('x2', at); }
    if (!first.paused) requestAnimationFrame(show);
  };
  first.addEventListener('play', () => { videos.slice(1).forEach(v => v.play()); show(); });
  first.addEventListener('pause', () => videos.slice(1).forEach(v => v.pause()));
  first.addEventListener('seeked', () => {
    videos.slice(1).forEach(v => v.currentTime = first.currentTime);
    show();
  });
}
"""


def write_page(
    source: Source,
    target: str | Path,
    *,
    episodes: Sequence[int] | None = None,
    pictures: int = 3,
    show: bool = True,
) -> Path:
    """Write the page of `source`, all in one file: size, problems that `check` finds, lengths, instructions,
    statistics, and of some episodes videos and curves. Returns `target`, which appears when it is whole.

    episodes: those to show; None takes up to six, evenly spread. pictures: see `check`.
    Raises LibrobotError for an episode that there is not, and for a target that cannot be written.
    """
    target, lengths = Path(target).expanduser(), source.episode_lengths
    if target.is_dir() or not target.parent.is_dir():
        what = "is a folder" if target.is_dir() else "its folder does not exist"
        raise LibrobotError(
            f"{target}: expected the name of a new page, such as {target.name}.html; it {what}"
        )
    chosen = _chosen(len(lengths), episodes)
    findings = check(source, pictures=pictures, show=show)
    parts = [_head(source), _problems(findings), _lengths(source), _instructions(source), _statistics(source)]
    parts.append("<h2>Episodes</h2>")
    with ProgressBar("drawing episodes", len(chosen), show=show) as progress:
        for episode in chosen:
            parts.append(_episode(source, episode, [f for f in findings if episode in f.episodes]))
            progress.advance(1)
    title = escape(str(source.provenance.get("root", "dataset")))
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style>{''.join(parts)}<script>{SCRIPT}</script></html>"
    )
    partial = target.with_name(f".{target.name}.tmp")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise LibrobotError(f"{target}: cannot be written: {error}") from error
    return target


def _chosen(count: int, episodes: Sequence[int] | None) -> list[int]:
    if episodes is None:
        return np.unique(np.linspace(0, count - 1, min(6, count)).round().astype(int)).tolist()
    for episode in episodes:
        if not 0 <= episode < count:
            raise LibrobotError(f"episodes: the dataset has episodes 0 to {count - 1}, found {episode}")
    return [int(episode) for episode in episodes]


def _head(source: Source) -> str:
    spec, lengths = source.spec, source.episode_lengths
    frames = int(lengths.sum())
    facts = {
        "robot": spec.name,
        "rate": f"{spec.control_hz:g} Hz",
        "episodes": f"{len(lengths):,}",
        "frames": f"{frames:,}",
        "duration": f"{frames / spec.control_hz / 60:.1f} min",
        "state": f"{spec.state_dim} numbers",
        "action": f"{spec.action_dim} numbers",
        **{f"camera {c.name}": f"{c.width} x {c.height}" for c in spec.cameras},
    }
    shown = "".join(
        f"<div><span class=soft>{escape(k)}</span><b>{escape(v)}</b></div>" for k, v in facts.items()
    )
    about = f"{source.provenance.get('format', '')}, seen by librobot {__version__}".lstrip(", ")
    title = escape(str(source.provenance.get("root", "dataset")))
    return f"<h1>{title}</h1><p class=note>{escape(about)}</p><div class=facts>{shown}</div>"


def _problems(findings: Sequence[Finding]) -> str:
    rows = "".join(
        f"<div class=bad><b>{escape(f.kind)}</b>: {escape(f.where)}: {escape(f.what)}</div>" for f in findings
    )
    return f"<h2>Problems found: {len(findings)}</h2>" + (rows or "<div class=good>nothing found</div>")


def _lengths(source: Source) -> str:
    lengths = source.episode_lengths
    counts, edges = np.histogram(lengths, bins=min(30, max(1, len(np.unique(lengths)))))
    width = 600 / len(counts)
    bars = "".join(
        f"<rect x={i * width + 1:.1f} y={110 - 100 * n / counts.max():.1f} width={max(width - 2, 1):.1f} "
        f"height={100 * n / counts.max():.1f} fill='{STATE}' rx=2><title>{edges[i]:.0f} to "
        f"{edges[i + 1]:.0f} frames: {n} episodes</title></rect>"
        for i, n in enumerate(counts)
    )
    return (
        f"<h2>Lengths of episodes</h2><svg viewBox='0 0 600 130' style='max-width:600px;width:100%'>{bars}"
        f"<text x=0 y=126 font-size=12 fill='#6b7280'>{lengths.min()} frames</text>"
        f"<text x=600 y=126 font-size=12 fill='#6b7280' text-anchor=end>{lengths.max()} frames</text></svg>"
        f"<p class=note>mean {lengths.mean():.1f}, median {np.median(lengths):.0f}</p>"
    )


def _instructions(source: Source) -> str:
    first = np.cumsum(source.episode_lengths) - source.episode_lengths
    said, counts = np.unique(source.prompts(first), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rows = "".join(
        f"<tr><td class=text>{escape(str(said[i])) or '(empty)'}<td>{counts[i]}" for i in order[:50]
    )
    more = f"<p class=note>and {len(said) - 50} more</p>" if len(said) > 50 else ""
    return (
        f"<h2>Instructions: {len(said)}</h2><div class=wide><table><tr><th>instruction, at an episode's start"
        f"<th>episodes{rows}</table></div>{more}"
    )


def _statistics(source: Source) -> str:
    rows, parts = np.arange(int(source.episode_lengths.sum())), ["<h2>Statistics</h2>"]
    for key, dims, values in (
        ("state", source.spec.state, source.states(rows)),
        ("action", source.spec.action, source.actions(rows)),
    ):
        if not dims:
            continue
        found = vector_statistics(values)
        body = "".join(
            f"<tr><td>{escape(dim.name)}<td>{escape(dim.unit or '-')}<td>{dim.kind}<td>{dim.mode}"
            + "".join(f"<td>{found[name][i]:.4g}" for name in COLUMNS)
            for i, dim in enumerate(dims)
        )
        head = "".join(f"<th>{name}" for name in (key, "unit", "kind", "mode", *COLUMNS))
        parts.append(f"<div class=wide><table><tr>{head}{body}</table></div><br>")
    return "".join(parts)


def _episode(source: Source, episode: int, findings: Sequence[Finding]) -> str:
    lengths = source.episode_lengths
    begin, length = int(lengths[:episode].sum()), int(lengths[episode])
    rows = begin + np.arange(length)
    prompt = source.prompts(rows[:1])[0] or "(no instruction)"
    parts = [f"<section class=episode><h3>Episode {episode}: {escape(prompt)}</h3>"]
    parts.append(f"<p class=note>{length} frames, {length / source.spec.control_hz:.1f} s</p>")
    parts.append("".join(f"<div class=bad><b>{escape(f.kind)}</b>: {escape(f.what)}</div>" for f in findings))
    parts.append(_videos(source, rows))
    parts.append(_plots(source, rows))
    return "".join(parts) + "</section>"


def _videos(source: Source, rows: np.ndarray) -> str:
    if not source.spec.cameras:
        return ""
    step = -(-len(rows) // MOST_FRAMES)
    shown = rows[::step]
    try:
        images = source.images(shown)
    except LibrobotError as error:
        return f"<div class=bad>{escape(str(error))}</div>"
    figures = []
    for name, frames in images.items():
        data = base64.b64encode(encode_video(frames, source.spec.control_hz / step)).decode()
        figures.append(
            f"<figure><video controls muted playsinline preload=metadata "
            f"src='data:video/mp4;base64,{data}'></video>"
            f"<figcaption>{escape(name)}{f', every {step}th frame' if step > 1 else ''}</figcaption></figure>"
        )
    return f"<div class=videos>{''.join(figures)}</div>"


def encode_video(frames: UInt8[np.ndarray, "t c h w"], rate: float) -> bytes:
    """An mp4 that browsers play (H.264, yuv420p), at most 240 pixels high."""
    import fractions

    import av

    height, width = frames.shape[2:]
    scale = min(1.0, VIDEO_HEIGHT / height)
    size = [max(2, round(side * scale / 2) * 2) for side in (height, width)]  # H.264 wants even sides
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fractions.Fraction(rate).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = size[0], size[1], "yuv420p"
        stream.options = {"crf": "28", "preset": "veryfast"}
        for frame in frames:
            picture = resize_with_padding(frame.transpose(1, 2, 0), *size)
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"))
            )
        container.mux(stream.encode())
    return file.getvalue()


def _plots(source: Source, rows: np.ndarray) -> str:
    """A small plot for each name: state and action together where both have it."""
    states, actions = source.states(rows), source.actions(rows)
    by_name: dict[str, list[tuple[str, Dim, np.ndarray]]] = {}
    for colour, dims, values in ((STATE, source.spec.state, states), (ACTION, source.spec.action, actions)):
        for i, dim in enumerate(dims):
            key = dim.name if dim.mode == "absolute" else f"{dim.name} (change)"
            by_name.setdefault(key, []).append((colour, dim, values[:, i]))
    plots = "".join(_plot(name, curves) for name, curves in by_name.items())
    key = "".join(
        f"<i style='background:{colour}'></i>{name}"
        for name, colour in (("state", STATE), ("action", ACTION))
    )
    return f"<p class=note><span class=key>{key}</span></p><div class=plots>{plots}</div>"


def _plot(name: str, curves: Iterable[tuple[str, Dim, Float[np.ndarray, " t"]]]) -> str:
    drawn = list(curves)
    low, high = (float(f([f(values) for _, _, values in drawn])) for f in (np.min, np.max))
    room = (high - low) or 1.0
    lines = ""
    for colour, _, values in drawn:
        across = np.linspace(0, 300, len(values)) if len(values) > 1 else np.array([150.0])
        points = " ".join(
            f"{x:.1f},{76 - 72 * (y - low) / room:.1f}" for x, y in zip(across, values, strict=True)
        )
        lines += f"<polyline points='{points}' stroke='{colour}' />"
    unit = f" {drawn[0][1].unit}" if drawn[0][1].unit else ""
    return (
        f"<div class=plot>{escape(name)}<span class=range>{low:.3g} to {high:.3g}{escape(unit)}</span>"
        f"<svg viewBox='0 0 300 80' preserveAspectRatio=none>{lines}"
        f"<line class=now x1=0 x2=0 y1=0 y2=80 stroke='#9ca3af' /></svg></div>"
    )
