"""Command line of ``tools/visualize.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from densessl.command import run_command
from densessl.datasets import read_image
from densessl.datasets.transforms.multi_crop import MultiCrop
from densessl.engine.launch import load_config
from densessl.engine.launch import parse_args as training_args
from densessl.errors import DenseSSLError
from densessl.evaluation import FeatureExtractor
from densessl.interop.backbone import BACKBONE_FILE
from densessl.models.matchers import ViewTokens, build_matcher

from .curves import save_comparison
from .frozen import add_commands
from .matches import draw_matches, match_distance, stack_titled
from .points import draw_points
from .position import draw_command as position_command
from .views import (
    View,
    check_size,
    cut_views,
    extractors,
    plain_crop,
    write_sheet,
    zoom_of,
)


def main(argv: list[str] | None = None) -> int:
    """Draw what the command line asks for; users' errors end in one line and code 2."""
    args = _parse(argv)
    return run_command(args.draw, args)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='tools/visualize.py')
    what = parser.add_subparsers(dest='what', required=True)

    def add(name: str, draw, about: str) -> argparse.ArgumentParser:
        command = what.add_parser(name, help=about)
        command.set_defaults(draw=draw)
        command.add_argument('config', help='the training config')
        command.add_argument(
            'checkpoint', help=f'step_*.pth or {BACKBONE_FILE} of a work dir'
        )
        command.add_argument('images', nargs='+', metavar='IMAGE')
        command.add_argument('--seed', type=int, default=0, help='of what is drawn')
        command.add_argument('--out', default=f'work_dirs/{name}', metavar='DIR')
        return command

    matches = add(
        'matches',
        _matches,
        'lines between matched tokens of two views, by each matcher',
    )
    matches.add_argument(
        '--between',
        action='store_true',
        help='match each two pictures, by similarity, in place of two views of one',
    )
    matches.add_argument(
        '--size', type=int, help="px of a view; default: the config's first view"
    )
    matches.add_argument(
        '--lines', type=int, default=24, help='most lines of a row, spread evenly'
    )
    position = add(
        'position',
        position_command,
        "LOCA's places of query patches, with less and less to see",
    )
    position.add_argument(
        '--ratios',
        nargs='+',
        type=float,
        default=[0.0, 0.8, 1.0],
        metavar='RATIO',
        help='shares of the reference that are hidden, 0 to 1, a row for each',
    )
    points = add(
        'points', draw_points, 'reference points in two views, and what each attends to'
    )
    points.add_argument(
        '--points', type=int, metavar='M', help="of a pair; default: the config's"
    )
    points.add_argument(
        '--sampling', choices=['random', 'grid'], help="default: the config's"
    )
    add_commands(what)
    curves = what.add_parser('curves', help='logged values of several runs in one PNG')
    curves.set_defaults(draw=_curves)
    curves.add_argument('work_dirs', nargs='+', metavar='WORK_DIR')
    curves.add_argument(
        '--values',
        nargs='+',
        default=['loss'],
        metavar='NAME',
        help='names in scalars.json, such as region/match_perplexity',
    )
    curves.add_argument('--out', default='work_dirs/curves.png', metavar='PNG')
    return parser.parse_args(argv)


def _curves(args: argparse.Namespace) -> None:
    """A panel for each value, a line for each run."""
    runs = {
        Path(folder).name: sorted(Path(folder).glob('*/vis_data/scalars.json'))
        for folder in args.work_dirs
    }
    save_comparison(runs, args.values, args.out)
    print(args.out)


def _matches(args: argparse.Namespace) -> None:
    """One PNG for each picture, or with ``--between`` for each two."""
    if args.lines < 1:
        raise DenseSSLError(f'--lines {args.lines}: give a number of lines, 1 or more')
    if args.between and len(args.images) % 2:
        raise DenseSSLError(
            f'--between: {len(args.images)} picture(s); give an even number, the first '
            'is matched with the second, the third with the fourth'
        )
    images = [read_image(path) for path in args.images]
    cfg = load_config(training_args([args.config]))
    crop = plain_crop(cfg, args.size)
    student, teacher = extractors(cfg, Path(args.checkpoint))
    check_size(student.backbone, crop.views[0].size)
    views = [
        _two_views(crop, image, np.random.default_rng([args.seed, i]))
        for i, image in enumerate(images)
    ]
    names = [Path(path).stem for path in args.images]
    if args.between:
        names = [f'{a}_{b}' for a, b in zip(names[::2], names[1::2], strict=True)]
        views = [(a[0], b[1]) for a, b in zip(views[::2], views[1::2], strict=True)]
    matchers = ('similarity',) if args.between else ('similarity', 'geometric')
    for i, (name, pair) in enumerate(zip(names, views, strict=True)):
        path = Path(args.out) / f'{i:03d}_{name}.png'
        sheet = _sheet(pair, student, teacher, matchers, args.lines, args.between)
        write_sheet(path, sheet)
        print(path)


def _sheet(
    views: tuple[View, View],
    student: FeatureExtractor,
    teacher: FeatureExtractor,
    matchers: tuple[str, ...],
    lines: int,
    between: bool,
) -> np.ndarray:
    """A row for each matcher: lines from the student's to the teacher's tokens."""
    ours, theirs = (
        _tokens(extractor, view)
        for extractor, view in zip((student, teacher), views, strict=True)
    )
    grids = ours.grid, theirs.grid
    pixels = views[0].pixels, views[1].pixels
    zoom = zoom_of(views[0])
    rows = {}
    for short in matchers:
        matcher = build_matcher(short)
        index, valid = (part[0, 0].cpu() for part in matcher(ours, theirs))
        title = type(matcher).__name__
        if not between:
            away, count = match_distance(
                views[0].geometry, views[1].geometry, grids, index
            )
            title += (
                f': {away:.2f} tokens off, mean of {count} in the overlap'
                if count
                else ': the views do not overlap'
            )
        rows[title] = draw_matches(
            pixels, grids, index.numpy(), valid.numpy(), lines=lines, zoom=zoom
        )
    return stack_titled(rows)


def _tokens(extractor: FeatureExtractor, view: View) -> ViewTokens:
    tokens = extractor(view.pixels[None])
    return ViewTokens(tokens.patches[None], tokens.grid, view.geometry[None, None])


def _two_views(
    crop: MultiCrop, image: np.ndarray, rng: np.random.Generator
) -> tuple[View, View]:
    """The first two views of a picture."""
    (views,) = cut_views(crop, image, rng).values()
    return views[0], views[1]
