"""Curves from the logs of runs: one run's own, or a value in several."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from densessl.errors import DenseSSLError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = tuple[list[int], list[float]]
"""Iterations, rising, and the values logged at them."""


def read_scalars(paths: Path | str | Sequence[Path | str]) -> dict[str, Series]:
    """Every number that MMEngine's local backend logged, by name.

    A line tells its iteration as ``iter``, or else as ``step``. The half line that a
    killed run may leave is passed over.

    Args:
        paths: ``scalars.json`` of a run, one JSON object a line; or one file for each
            time the run was resumed, the oldest first. Where two files tell of the
            same iteration, the later one holds.

    Returns:
        For each name, without a ``train/`` in front, iterations and values. A value
        that is not finite becomes NaN.

    Raises:
        DenseSSLError: a file is missing, or holds no loss of any iteration.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    values: dict[str, dict[int, float]] = {}
    for path in paths:
        try:
            lines = Path(path).read_text(encoding='utf-8').splitlines()
        except OSError as error:
            raise DenseSSLError(
                f'training log {path}: {error.strerror}; give the scalars.json under '
                'vis_data of the work dir'
            ) from None
        for line in lines:
            _read_line(line, values)
    if 'loss' not in values:
        names = ', '.join(map(str, paths)) or '(no file)'
        raise DenseSSLError(
            f'training log {names}: no line has a "loss"; '
            'train until the first log interval has passed'
        )
    return {
        name: (sorted(at), [at[step] for step in sorted(at)])
        for name, at in values.items()
    }


def save_curves(paths: Path | str | Sequence[Path | str], out_png: Path | str) -> None:
    """Draw the curves of a run into a PNG of 1200x400 px.

    Three panels over iterations: the total loss and the loss of every head; entropies
    and divergences, which show a collapse; learning rate, weight decay and momenta,
    each between its own least and greatest value, which its label tells.

    Args:
        paths: as for `read_scalars`.
        out_png: the PNG; its folder is made.

    Raises:
        DenseSSLError: as `read_scalars`.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    series = read_scalars(paths)
    figure = Figure(figsize=(12, 4), dpi=100, layout='constrained')
    losses, monitors, schedules = figure.subplots(1, 3)
    _draw(losses, 'loss', _chosen(series, _is_loss))
    _draw(monitors, 'entropy and divergence', _chosen(series, _is_monitor))
    shares = dict(_share(*item) for item in _chosen(series, _is_schedule).items())
    _draw(schedules, 'schedules, each in its own range', shares, overlaid=True)
    schedules.set_yticks([])
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, format='png')


def save_comparison(
    runs: Mapping[str, Sequence[Path | str]],
    names: Sequence[str],
    out_png: Path | str,
) -> None:
    """Draw logged values of several runs, a panel of 400x400 px for each value.

    Args:
        runs: for each run's label the paths of its logs, as for `read_scalars`.
        names: of the values, such as ``'region/match_perplexity'``.
        out_png: the PNG; its folder is made.

    Raises:
        DenseSSLError: as `read_scalars`, or a run has not logged a value.
    """
    from matplotlib.figure import Figure

    series = {label: read_scalars(paths) for label, paths in runs.items()}
    for label, logged in series.items():
        for name in names:
            if name not in logged:
                near = difflib.get_close_matches(name, list(logged), 3, cutoff=0)
                raise DenseSSLError(
                    f'training log of {label}: no value {name!r}; it has, for example, '
                    f'{", ".join(near)}'
                )
    figure = Figure(figsize=(4 * len(names), 4), dpi=100, layout='constrained')
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        _draw(panel, name, {label: logged[name] for label, logged in series.items()})
        panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, format='png')


def _read_line(line: str, values: dict[str, dict[int, float]]) -> None:
    """Add the numbers of one JSON line to ``values[name][iteration]``."""
    try:
        entry = json.loads(line)
    except ValueError:
        return
    if not isinstance(entry, dict):
        return
    step = entry.get('iter', entry.get('step'))
    if not isinstance(step, int):
        return
    for name, value in entry.items():
        if name not in ('iter', 'step') and isinstance(value, int | float):
            kept = float(value) if math.isfinite(value) else math.nan
            values.setdefault(name.removeprefix('train/'), {})[step] = kept


def _is_loss(name: str) -> bool:
    return name == 'loss' or name.startswith('loss_')


def _is_monitor(name: str) -> bool:
    return 'entropy' in name or 'kl' in name.split('_')


def _is_schedule(name: str) -> bool:
    return name in ('lr', 'weight_decay') or name.endswith('momentum')


def _chosen(
    series: dict[str, Series], wanted: Callable[[str], bool]
) -> dict[str, Series]:
    return {name: series[name] for name in sorted(series) if wanted(name)}


def _share(name: str, series: Series) -> tuple[str, Series]:
    """A series between 0 and 1, and a label that tells what 0 and 1 stand for."""
    steps, values = series
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=math.nan), max(finite, default=math.nan)
    if not low < high:
        return f'{name}: {low:.4g}', (steps, [0.5 for _ in values])
    shares = [(value - low) / (high - low) for value in values]
    return f'{name}: {low:.4g} to {high:.4g}', (steps, shares)


def _draw(
    axes: Axes, title: str, series: dict[str, Series], *, overlaid: bool = False
) -> None:
    """One panel; few points get a dot each, so that even a single one is seen.

    Where curves may coincide (``overlaid``), every other one is dashed.
    """
    for index, (name, (steps, values)) in enumerate(series.items()):
        axes.plot(
            steps,
            values,
            linestyle=(0, (8, 8)) if overlaid and index % 2 else '-',
            zorder=2 + index % 2,  # the dashed line above its equals
            label=name,
            linewidth=2.0 if name == 'loss' else 1.0,
            marker='.' if len(steps) <= 30 else None,
        )
    axes.set_title(title, fontsize=10)
    axes.set_xlabel('iteration', fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize=7)
    else:
        axes.text(0.5, 0.5, 'not logged', ha='center', transform=axes.transAxes)
