"""Command line of ``tools/visualize.py``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from mmengine.config import Config

from densessl.datasets import read_image
from densessl.datasets.transforms.multi_crop import MultiCrop, ViewRecipe
from densessl.engine.checkpoint import load_run
from densessl.engine.launch import load_config
from densessl.engine.launch import parse_args as training_args
from densessl.errors import DenseSSLError
from densessl.evaluation import FeatureExtractor
from densessl.geometry import ViewGeometry
from densessl.interop.backbone import BACKBONE_FILE, load_strictly, read_backbone
from densessl.models.matchers import ViewTokens, build_matcher
from densessl.registry import MODELS, TRANSFORMS

from .curves import save_comparison
from .matches import draw_matches, match_distance, stack_titled

_VIEW_PX = 256
"""Views smaller than this are enlarged by a whole number."""


class View(NamedTuple):
    """A view: uint8 RGB ``(H, W, 3)``, and where it lies, of shape ``()``."""

    pixels: np.ndarray
    geometry: ViewGeometry


def main(argv: list[str] | None = None) -> int:
    """Draw what the command line asks for; users' errors end in one line and code 2."""
    args = _parse(argv)
    try:
        args.draw(args)
    except DenseSSLError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='tools/visualize.py')
    what = parser.add_subparsers(dest='what', required=True)
    matches = what.add_parser(
        'matches', help='lines between matched tokens of two views, by each matcher'
    )
    matches.set_defaults(draw=_matches)
    matches.add_argument('config', help='the training config')
    matches.add_argument(
        'checkpoint', help=f'step_*.pth or {BACKBONE_FILE} of a work dir'
    )
    matches.add_argument('images', nargs='+', metavar='IMAGE')
    matches.add_argument(
        '--between',
        action='store_true',
        help='match each two pictures, by similarity, in place of two views of one',
    )
    matches.add_argument('--out', default='work_dirs/matches', metavar='DIR')
    matches.add_argument('--seed', type=int, default=0, help='of the views')
    matches.add_argument(
        '--size', type=int, help="px of a view; default: the config's first view"
    )
    matches.add_argument(
        '--lines', type=int, default=24, help='most lines of a row, spread evenly'
    )
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
    crop = _plain_crop(cfg, args.size)
    student, teacher = _extractors(cfg, Path(args.checkpoint))
    _check_size(student, crop.views[0].size)
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
        _write(path, sheet)
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
    zoom = -(-_VIEW_PX // max(pixels[0].shape))
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


def _write(path: Path, sheet: np.ndarray) -> None:
    """A PNG, compressed as far as it goes: half of what OpenCV's default leaves."""
    bgr = np.ascontiguousarray(sheet[:, :, ::-1])
    _, data = cv2.imencode('.png', bgr, (cv2.IMWRITE_PNG_COMPRESSION, 9))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise DenseSSLError(
            f'cannot write {path}: {error.strerror}; choose another --out'
        ) from error


def _tokens(extractor: FeatureExtractor, view: View) -> ViewTokens:
    tokens = extractor(view.pixels[None])
    return ViewTokens(tokens.patches[None], tokens.grid, view.geometry[None, None])


def _plain_crop(cfg: Config, size: int | None) -> MultiCrop:
    """The config's views of its first role, two or more, with their colours left."""
    crops = [t for t in cfg.train_dataloader.dataset.pipeline if 'views' in t]
    if len(crops) != 1:
        raise DenseSSLError(
            f'config {cfg.filename}: {len(crops)} transforms that cut views; one '
            'is needed, such as MultiCrop'
        )
    if size is not None and size < 1:
        raise DenseSSLError(f'--size {size}: give px, 1 or more')
    recipes = [ViewRecipe.from_config(recipe) for recipe in crops[0]['views']]
    first = [recipe for recipe in recipes if recipe.role == recipes[0].role]
    colours_left = dict(jitter=0, grayscale=0, blur=0, solarize=0)
    plain = [
        replace(recipe, size=size or recipe.size, **colours_left) for recipe in first
    ]
    if sum(recipe.count for recipe in plain) < 2:
        plain[0] = replace(plain[0], count=2)
    return TRANSFORMS.build(dict(crops[0], views=plain))


def _two_views(
    crop: MultiCrop, image: np.ndarray, rng: np.random.Generator
) -> tuple[View, View]:
    """The first two views of a picture."""
    results = crop(dict(img=image, rng=rng))
    (views,) = results['inputs'].values()
    pixels = views[:2].permute(0, 2, 3, 1).contiguous().numpy()
    first, second = map(View, pixels, (results['geometry'][i] for i in range(2)))
    return first, second


def _extractors(cfg: Config, path: Path) -> tuple[FeatureExtractor, FeatureExtractor]:
    """Student and teacher of a run, or a backbone's file in both places."""
    if not path.is_file():
        raise DenseSSLError(
            f'checkpoint {path}: no such file; give step_*.pth or {BACKBONE_FILE} of a '
            'work dir'
        )
    if path.suffix == '.safetensors':
        state, about = read_backbone(path)
        both = _extractor(cfg, state, path, about['mean'], about['std'])
        return both, both
    try:
        weights = load_run(path)['state_dict']
    except DenseSSLError as error:  # which speaks of --resume
        raise DenseSSLError(
            f'checkpoint {path}: not a checkpoint of a run, or a damaged one; give '
            f'step_*.pth or {BACKBONE_FILE} of a work dir'
        ) from error
    preprocessor = cfg.model.get('data_preprocessor') or dict(type='ViewPreprocessor')
    normalization = MODELS.build(preprocessor).normalization
    student, teacher = (
        {
            key.removeprefix(prefix): value
            for key, value in weights.items()
            if key.startswith(prefix)
        }
        for prefix in ('backbone.', 'teacher.backbone.')
    )
    return (
        _extractor(cfg, student, path, **normalization),
        _extractor(cfg, teacher, path, **normalization),
    )


def _extractor(cfg: Config, state: dict, path: Path, mean, std) -> FeatureExtractor:
    try:
        backbone = MODELS.build(cfg.model.backbone)
    except (KeyError, TypeError) as error:
        line = ' '.join(str(error.args[0]).split())
        raise DenseSSLError(f'config {cfg.filename}: {line}') from error
    load_strictly(backbone, state, f'checkpoint {path}')
    return FeatureExtractor(backbone, mean, std)


def _check_size(extractor: FeatureExtractor, size: tuple[int, int]) -> None:
    """Tokens must cover the view exactly, or their places are not known."""
    stride = extractor.backbone.patch_size
    if size[0] % stride or size[1] % stride:
        raise DenseSSLError(
            f'views of {size[0]}x{size[1]} px: tokens of this backbone are {stride} px '
            f'apart; give a multiple of {stride} by --size'
        )
