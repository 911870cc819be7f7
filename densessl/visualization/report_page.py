"""One HTML page that compares runs; ``tools/report.py`` is this module's ``main``.

The page stands alone: curves are inline SVG, pictures are data URIs, and there is no
script. It opens without a network.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mmengine.config import Config

from densessl.command import run_command
from densessl.errors import DenseSSLError

from .curves import Series, read_scalars

COLOURS = ('#1b6ca8', '#c8452c', '#2e8b57', '#8a4fbf', '#b8860b', '#40807f', '#a0306c')
"""Of the runs, in turn."""
MOST_POINTS = 400
"""Of a curve; a longer one keeps the least and greatest value of each stretch."""
_PANEL = (330, 190)
_MARGIN = (58, 8, 8, 24)  # left, right, top, bottom, px
_DAMAGE = (
    AttributeError,
    LookupError,
    NameError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
)
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1120px;padding:0 1em}
table{border-collapse:collapse;margin:.6em 0}
td,th{border:1px solid #bbb;padding:.2em .6em;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}
figure{display:inline-block;margin:.3em}figcaption{font-size:13px}
svg{background:#fafafa;border:1px solid #ddd}svg text{font-size:10px;fill:#444}
polyline{fill:none;stroke-width:1.6;stroke-linecap:round}
img{max-width:100%}code{overflow-wrap:anywhere}
"""


@dataclass(frozen=True)
class Run:
    """What a work dir holds.

    Attributes:
        name: how the page calls it; unlike those of the other runs.
        scalars: as `read_scalars` gives them.
        scores: of ``report.json``, mIoU and pixel accuracy by network; may be empty.
        config: dotted keys and plain values of the newest start's config.
        picture: ``features.png``, or None.
    """

    name: str
    scalars: dict[str, Series]
    scores: dict[str, Any]
    config: dict[str, Any]
    picture: Path | None


def main(argv: list[str] | None = None) -> int:
    """Write the page; users' errors end in one line and code 2."""
    parser = argparse.ArgumentParser(
        prog='tools/report.py', description='Compare runs on one HTML page.'
    )
    parser.add_argument('work_dirs', nargs='+', metavar='WORK_DIR')
    parser.add_argument('--out', default='report.html', metavar='HTML')
    return run_command(_report, parser.parse_args(argv))


def _report(args: argparse.Namespace) -> None:
    save_report(args.work_dirs, args.out)
    print(args.out)


def save_report(folders: Sequence[Path | str], out: Path | str) -> None:
    """Write the page of some work dirs.

    Args:
        folders: one or more; a run goes by its folder's name, or by the whole path
            where two have one name.
        out: the HTML file; its folder is made.

    Raises:
        DenseSSLError: a folder is no work dir, or the page cannot be written.
    """
    paths = [Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DenseSSLError(f'report: {twice} is named twice; give each work dir once')
    runs = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(runs), encoding='utf-8')
    except OSError as error:
        raise DenseSSLError(
            f'cannot write {out}: {error.strerror}; choose another --out'
        ) from error


def read_run(folder: Path, name: str) -> Run:
    """What a work dir holds.

    Raises:
        DenseSSLError: it has no log, or one of its files is damaged.
    """
    logs = sorted(folder.glob('*/vis_data/scalars.json'))
    if not logs:
        found = 'no such folder' if not folder.is_dir() else 'no training log in it'
        raise DenseSSLError(
            f'report: {folder} is no work dir ({found}); give the --work-dir of a run '
            'of tools/train.py, with */vis_data/scalars.json'
        )
    config: dict[str, Any] = {}
    configs = sorted(folder.glob('*/vis_data/config.py'))
    scores = folder / 'report.json'
    try:
        if configs:
            cfg = Config.fromfile(configs[-1], import_custom_modules=False)
            config = flatten(cfg.to_dict())
        found = json.loads(scores.read_text()) if scores.is_file() else {}
        found = {network: dict(score) for network, score in found.items()}
    except _DAMAGE as error:
        raise DenseSSLError(
            f'report: {folder}: its config or report.json cannot be read '
            f'({type(error).__name__}); write it anew by the end of a run, or delete it'
        ) from error
    picture = folder / 'features.png'
    return Run(
        name,
        read_scalars(logs),
        found,
        config,
        picture if picture.is_file() else None,
    )


def flatten(node: Any, prefix: str = '') -> dict[str, Any]:
    """Leaves of nested dicts and lists by dotted key; an empty one is a leaf."""
    if isinstance(node, Mapping) and node:
        items = [(str(key), value) for key, value in node.items()]
    elif isinstance(node, list | tuple) and any(isinstance(x, Mapping) for x in node):
        items = [(str(i), value) for i, value in enumerate(node)]
    else:
        return {prefix: node}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= flatten(value, f'{prefix}.{key}' if prefix else key)
    return leaves


def page(runs: Sequence[Run]) -> str:
    """The page's HTML."""
    colours = {run.name: COLOURS[i % len(COLOURS)] for i, run in enumerate(runs)}
    names = sorted({name for run in runs for name in run.scalars}, key=_order)
    title = escape(' · '.join(run.name for run in runs))
    parts = [
        '<!DOCTYPE html>',
        '<html lang="en"><head><meta charset="utf-8">',
        f'<title>{title}</title><style>{_STYLE}</style></head><body>',
        '<h1>Training runs</h1><ul>',
        *(
            f'<li style="color:{colours[run.name]}">{escape(run.name)}: '
            f'{max(steps[-1] for steps, _ in run.scalars.values())} steps</li>'
            for run in runs
        ),
        '</ul>',
        '<h2>Scores</h2>',
        _scores(runs),
        '<h2>Last values</h2>',
        _table(
            ['logged value', *(run.name for run in runs)],
            [[name, *(_last(run.scalars.get(name)) for run in runs)] for name in names],
            'values',
        ),
        '<h2>Curves</h2>',
        *(curve(name, _logged(runs, name), colours) for name in names),
        '<h2>Config</h2>',
        _config(runs),
        '<h2>Features</h2>',
        *(_picture(run) for run in runs),
        '</body></html>',
    ]
    return '\n'.join(parts)


def curve(name: str, series: Mapping[str, Series], colours: Mapping[str, str]) -> str:
    """A figure with a line for each run over iterations; NaN leaves a gap.

    A line's element has the run as ``data-run``. The corners of the axes are labelled
    with the least and greatest iteration and value.
    """
    steps = [step for each in series.values() for step in each[0]]
    values = [v for each in series.values() for v in each[1] if math.isfinite(v)]
    caption = f'<figcaption>{escape(name)}</figcaption>'
    if not values:
        return f'<figure><p>no finite value</p>{caption}</figure>'
    x0, x1, y0, y1 = min(steps), max(steps), min(values), max(values)
    width, height = _PANEL
    left, right, top, bottom = _MARGIN

    def place(step: float, value: float) -> tuple[float, float]:
        x = (step - x0) / (x1 - x0) if x1 > x0 else 0.5
        y = (value - y0) / (y1 - y0) if y1 > y0 else 0.5
        across, up = width - left - right, height - top - bottom
        return left + x * across, height - bottom - y * up

    lines = []
    for run, (at, level) in series.items():
        shape = f'stroke="{colours[run]}" data-run="{escape(run)}"'
        for piece in _pieces(*thinned(at, level)):
            piece = piece * 2 if len(piece) == 1 else piece  # a dot, by its round ends
            points = ' '.join('{:.2f},{:.2f}'.format(*place(*point)) for point in piece)
            lines.append(f'<polyline points="{points}" {shape}/>')
    floor, end = height - bottom, width - right
    labels = [
        f'<text x="{left - 4}" y="{top + 8}" text-anchor="end">{y1:.4g}</text>',
        f'<text x="{left - 4}" y="{floor}" text-anchor="end">{y0:.4g}</text>',
        f'<text x="{left}" y="{height - 8}">{x0}</text>',
        f'<text x="{end}" y="{height - 8}" text-anchor="end">{x1}</text>',
        f'<path d="M{left} {top}V{floor}H{end}" stroke="#999" fill="none"/>',
    ]
    inside = ''.join(labels + lines)
    svg = f'<svg role="img" width="{width}" height="{height}">{inside}</svg>'
    return f'<figure>{svg}{caption}</figure>'


def thinned(
    steps: Sequence[int], values: Sequence[float], most: int = MOST_POINTS
) -> tuple[list[int], list[float]]:
    """About ``most`` points of a longer curve, with its peaks and gaps.

    Each of ``most / 2`` stretches keeps the places of its least and greatest value,
    and of its first value that is not finite; the first and last point stay.
    """
    if len(steps) <= most:
        return list(steps), list(values)
    kept = {0, len(steps) - 1}
    stretch = -(-len(steps) * 2 // most)
    for start in range(0, len(steps), stretch):
        places = range(start, min(start + stretch, len(steps)))
        finite = [i for i in places if math.isfinite(values[i])]
        if finite:
            kept |= {min(finite, key=values.__getitem__)}
            kept |= {max(finite, key=values.__getitem__)}
        kept |= set([i for i in places if not math.isfinite(values[i])][:1])
    chosen = sorted(kept)
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def _pieces(steps: list[int], values: list[float]) -> list[list[tuple[int, float]]]:
    """A curve cut where a value is not finite."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            pieces[-1].append((step, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _order(name: str) -> tuple[bool, bool, str]:
    """Losses first, monitors of heads last."""
    return not name.startswith('loss'), '/' in name, name


def _logged(runs: Sequence[Run], name: str) -> dict[str, Series]:
    return {run.name: run.scalars[name] for run in runs if name in run.scalars}


def _last(series: Series | None) -> float | None:
    return None if series is None else series[1][-1]


def _scores(runs: Sequence[Run]) -> str:
    """Best and last values of the probe, and what ``report.json`` holds."""
    rows = []
    for name in sorted({n for r in runs for n in r.scalars if n.startswith('probe/')}):
        logged = [run.scalars.get(name, ([], []))[1] for run in runs]
        finite = [[v for v in values if math.isfinite(v)] for values in logged]
        best = [max(values, default=None) for values in finite]
        rows.append([f'{name}, greatest', *best])
        rows.append([f'{name}, last', *(v[-1] if v else None for v in logged)])
    networks = sorted({network for run in runs for network in run.scores})
    for network in networks:
        for metric in ('miou', 'pixel_accuracy'):
            found = [run.scores.get(network, {}).get(metric) for run in runs]
            rows.append([f'report.json: {metric}, {network}', *found])
    if not rows:
        return '<p>No run has a score; see docs/visualization.md for the probe.</p>'
    return _table(['score', *(run.name for run in runs)], rows, 'scores')


def _config(runs: Sequence[Run]) -> str:
    """Keys whose values differ between the runs."""
    keys = sorted({key for run in runs for key in run.config})
    missing = object()
    rows = []
    for key in keys:
        found = [run.config.get(key, missing) for run in runs]
        if any(value is missing or value != found[0] for value in found):
            texts = ['(absent)' if v is missing else repr(v) for v in found]
            rows.append([key, *texts])
    if not rows:
        return '<p>The configs are equal.</p>'
    return _table(['key', *(run.name for run in runs)], rows, 'config')


def _picture(run: Run) -> str:
    name = escape(run.name)
    if run.picture is None:
        return f'<p>{name}: no features.png; a run draws it at its end.</p>'
    data = base64.b64encode(run.picture.read_bytes()).decode()
    source = f'data:image/png;base64,{data}'
    return (
        f'<figure><img alt="features of {name}" src="{source}">'
        f'<figcaption>{name}</figcaption></figure>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], kind: str) -> str:
    """A table; numbers are rounded to 5 digits and whole in ``data-value``."""
    lines = [''.join(f'<th>{escape(cell)}</th>' for cell in head)]
    for name, *cells in rows:
        line = f'<th>{escape(name)}</th>'
        for cell in cells:
            if cell is None:
                line += '<td></td>'
            elif isinstance(cell, str):
                line += f'<td><code>{escape(cell)}</code></td>'
            else:
                line += f'<td class="n" data-value="{cell!r}">{cell:.5g}</td>'
        lines.append(line)
    body = '\n'.join(f'<tr>{line}</tr>' for line in lines)
    return f'<table id="{kind}">\n{body}\n</table>'
