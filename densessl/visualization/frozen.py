"""Commands that look at a frozen backbone: attention, PCA and similarity."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from torch import nn

from densessl.datasets.channels import resize_channels, shown_as_rgb
from densessl.errors import DenseSSLError
from densessl.evaluation.features import FeatureExtractor
from densessl.evaluation.loading import KINDS, load_extractor

from .attention import attention_sheet, query_attention
from .panels import patch_at
from .pca import pca_image
from .similarity import cosines, similarity_sheets
from .views import write_sheet

HELP = dict(
    attention='what a query attends to in the last block, head by head',
    pca='patch features as colours, in a basis shared by the pictures',
    similarity='cosine of all patches to one of the first picture',
)


def add_commands(what: argparse._SubParsersAction) -> None:
    """Add the three commands to the parser of ``tools/visualize.py``."""
    draws = dict(attention=draw_attention, pca=draw_pca, similarity=draw_similarity)
    for name, draw in draws.items():
        parser = what.add_parser(name, help=HELP[name])
        parser.set_defaults(draw=draw)
        parser.add_argument('checkpoint', help=KINDS)
        parser.add_argument('images', nargs='+', metavar='IMAGE')
        parser.add_argument(
            '--size',
            type=int,
            nargs='+',
            default=[224],
            metavar='PX',
            help='side, or height and width, to which pictures are stretched; default: '
            '224',
        )
        parser.add_argument('--out', default=f'work_dirs/{name}', metavar='DIR')
        if name == 'pca':
            continue
        parser.add_argument(
            '--query',
            metavar='X,Y',
            help='point in fractions of width and height, 0 to 1; default: '
            + ('the class token, or else ' if name == 'attention' else '')
            + 'the centre',
        )
        if name == 'attention':
            parser.add_argument(
                '--mass',
                type=float,
                default=0.6,
                metavar='SHARE',
                help='share of the attention whose patches are coloured; default: 0.6',
            )


def draw_attention(args: argparse.Namespace) -> None:
    """One PNG for each picture."""
    extractor, images = _load(args)
    point = _point(args.query)
    for number, image in enumerate(images):
        found = query_attention(extractor, image, point)
        _write(args, number, attention_sheet(shown_as_rgb(image), found, args.mass))


def draw_pca(args: argparse.Namespace) -> None:
    """One PNG of all pictures."""
    extractor, images = _load(args)
    tokens = extractor(np.stack(images))
    path, shown = Path(args.out) / 'pca.png', list(map(shown_as_rgb, images))
    write_sheet(path, pca_image(tokens.patches, tokens.grid, shown, per_row=2))
    print(path)


def draw_similarity(args: argparse.Namespace) -> None:
    """One PNG for each picture."""
    extractor, images = _load(args)
    tokens = extractor(np.stack(images))
    query = patch_at(_point(args.query) or (0.5, 0.5), tokens.grid)
    values = cosines(tokens.patches, query)
    shown = list(map(shown_as_rgb, images))
    sheets = similarity_sheets(shown, values, query, tokens.grid)
    for number, sheet in enumerate(sheets):
        _write(args, number, sheet)


def _load(args: argparse.Namespace) -> tuple[FeatureExtractor, list[np.ndarray]]:
    """The backbone, and the pictures in the size that was asked for."""
    extractor, _ = load_extractor(args.checkpoint)
    images = [extractor.read(path) for path in args.images]
    height, width = _size(args.size, extractor.backbone)
    resized = []
    for image in images:
        fewer = height * width < image.shape[0] * image.shape[1]
        way = cv2.INTER_AREA if fewer else cv2.INTER_CUBIC
        resized.append(resize_channels(image, (height, width), way))
    return extractor, resized


def _size(sides: list[int], backbone: nn.Module) -> tuple[int, int]:
    """Height and width in px, multiples of the patch."""
    words, patch = f'--size {" ".join(map(str, sides))}', backbone.patch_size
    if len(sides) > 2:
        raise DenseSSLError(f'{words}: give a side, or height and width, in px')
    if any(side < patch or side % patch for side in sides):
        raise DenseSSLError(
            f'{words}: tokens of this backbone are {patch} px apart; give multiples of '
            f'{patch}'
        )
    return sides[0], sides[-1]


def _point(words: str | None) -> tuple[float, float] | None:
    """The point of ``--query X,Y``."""
    if words is None:
        return None
    try:
        x, y = map(float, words.split(','))
    except ValueError:
        raise DenseSSLError(
            f'--query {words}: not a point; give x,y in fractions of width and height, '
            'such as 0.5,0.25'
        ) from None
    return x, y


def _write(args: argparse.Namespace, number: int, sheet: np.ndarray) -> None:
    path = Path(args.out) / f'{number:03d}_{Path(args.images[number]).stem}.png'
    write_sheet(path, sheet)
    print(path)
