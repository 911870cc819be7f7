"""Lists of few labelled pictures; the command line of ``tools/fewshot_lists.py``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from densessl.command import run_command
from densessl.datasets.unlabelled import balanced_subset, scan_folder
from densessl.errors import DenseSSLError

PARTS = (32, 16, 8, 4, 2)


def segmentation_lists(
    pictures: Path, out: Path, *, parts: Sequence[int] = PARTS, folds: int = 5
) -> list[Path]:
    """Write ``fold<F>_1of<P>.txt``: stems of a random ``1/P`` of the pictures.

    A stem is the path below ``pictures`` without its ending, as MMSegmentation reads it
    from ``ann_file``. Fold ``F`` is drawn with seed ``F``; within a fold a smaller
    part is in every greater one.

    Args:
        pictures: folder of the training pictures, nested or flat.
        out: folder to write to.
        parts: the ``P``.
        folds: how many draws of each.

    Raises:
        DenseSSLError: there are fewer pictures than the greatest ``P``, or two have
            one stem.
    """
    stems = [name.rpartition('.')[0] for name in _names(pictures)]
    if len(set(stems)) < len(stems):
        twice = next(a for a, b in pairwise(sorted(stems)) if a == b)
        raise DenseSSLError(
            f'{pictures}: two pictures are called {twice}; keep one of them'
        )
    if min(parts) < 1 or folds < 1:
        raise DenseSSLError(f'parts {list(parts)}, {folds} folds; give 1 or more')
    if len(stems) < max(parts):
        raise DenseSSLError(
            f'{pictures}: {len(stems)} pictures, too few for 1/{max(parts)} of them; '
            'give smaller --parts'
        )
    written = []
    for fold in range(folds):
        order = np.random.default_rng(fold).permutation(len(stems))
        for part in parts:
            kept = sorted(stems[i] for i in order[: round(len(stems) / part)])
            written.append(_write(out / f'fold{fold}_1of{part}.txt', kept))
    return written


def class_lists(
    pictures: Path, out: Path, *, fractions: Sequence[float], seed: int = 0
) -> list[Path]:
    """Write ``seed<S>_<fraction>.txt``: pictures of equally many of each class.

    A line is ``CLASS/PICTURE NUMBER``, as MMPretrain's ``ann_file``, ``train_list`` of
    the protocols here and ``list_file`` of the training read it. See
    :func:`densessl.datasets.unlabelled.balanced_subset`.

    Args:
        pictures: folder of class folders.
        out: folder to write to.
        fractions: shares in (0, 1].
        seed: of the choice.

    Raises:
        DenseSSLError: a fraction is out of range, or pictures lie outside a class.
    """
    names = [os.fsencode(name) for name in _names(pictures)]
    classes = sorted({name.partition(b'/')[0] for name in names})
    written = []
    for fraction in fractions:
        kept = balanced_subset(names, fraction, seed, str(pictures))
        lines = [
            f'{os.fsdecode(name)} {classes.index(name.partition(b"/")[0])}'
            for name in kept
        ]
        written.append(_write(out / f'seed{seed}_{fraction:g}.txt', lines))
    return written


def main(argv: list[str] | None = None) -> int:
    """Entry point; users' errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(prog='tools/fewshot_lists.py')
    kinds = parser.add_subparsers(dest='kind', required=True)
    segmentation = kinds.add_parser(
        'segmentation', help='stems of pictures, for MMSegmentation'
    )
    segmentation.add_argument('--parts', nargs='+', type=int, default=list(PARTS))
    segmentation.add_argument('--folds', type=int, default=5)
    classes = kinds.add_parser(
        'classes', help='pictures with equally many of each class'
    )
    classes.add_argument('--fractions', nargs='+', type=float, default=[0.01, 0.1])
    classes.add_argument('--seed', type=int, default=0)
    for kind in (segmentation, classes):
        kind.add_argument('pictures', metavar='DIR', help='of the training pictures')
        kind.add_argument('--out', required=True, metavar='DIR')
    return run_command(_run, vars(parser.parse_args(argv)))


def _run(args: dict[str, Any]) -> None:
    write = {'segmentation': segmentation_lists, 'classes': class_lists}
    write = write[args.pop('kind')]
    for path in write(Path(args.pop('pictures')), Path(args.pop('out')), **args):
        print(path)


def _names(folder: Path) -> list[str]:
    """Pictures below a folder, relative, in order."""
    if not folder.is_dir():
        raise DenseSSLError(f'{folder}: no such folder; give that of the pictures')
    names, _ = scan_folder(str(folder))
    if not names:
        raise DenseSSLError(f'{folder}: holds no pictures; give another folder')
    return sorted(map(os.fsdecode, names))


def _write(path: Path, lines: Sequence[str]) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n'.join(lines) + '\n')
    except OSError as error:
        raise DenseSSLError(
            f'cannot write {path}: {error.strerror}; choose another --out'
        ) from error
    return path
