"""Reference points in the views of a picture, and what each attends to (DenseDINO)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor

from densessl.datasets import read_image
from densessl.engine.launch import load_config
from densessl.engine.launch import parse_args as training_args
from densessl.errors import DenseSSLError
from densessl.evaluation import FeatureExtractor
from densessl.evaluation.loading import build_part
from densessl.models.backbones import VisionTransformer
from densessl.models.heads.point_head import PointHead
from densessl.registry import MODELS, TRANSFORMS

from .matches import GAP_PX, draw_dot, place_colours, stack_titled
from .views import (
    View,
    cut_views,
    extractors,
    plain_recipes,
    view_config,
    write_sheet,
    zoom_of,
)

_LARGE_DOT_PX = 6


def draw_points(args: argparse.Namespace) -> None:
    """One PNG for each picture: the points of its first view with each other one."""
    images = [read_image(path) for path in args.images]
    cfg = load_config(training_args([args.config]))
    config = _head_config(cfg)
    crop = view_config(cfg)
    crop = TRANSFORMS.build(dict(crop, views=plain_recipes(crop)))
    if crop.num_views < 2:
        raise DenseSSLError(
            f'config {cfg.filename}: points compare two views of a picture, and the '
            'recipe cuts one; add a view'
        )
    _, teacher = extractors(cfg, Path(args.checkpoint))
    for option in ('points', 'sampling'):
        if getattr(args, option) is not None:
            config[option] = getattr(args, option)
    head = build_part(
        dict(config, embed_dims=teacher.backbone.embed_dims), f'config {cfg.filename}'
    )
    for i, (name, image) in enumerate(zip(args.images, images, strict=True)):
        by_role = cut_views(crop, image, np.random.default_rng([args.seed, i]))
        views = [view for role in by_role.values() for view in role]
        torch.manual_seed(args.seed)  # the head draws from torch's generator
        path = Path(args.out) / f'{i:03d}_{Path(name).stem}.png'
        write_sheet(path, _sheet(views, head, teacher))
        print(path)


def _head_config(cfg: Config) -> dict:
    """The points head of a config whose backbone can carry points."""
    kind = cfg.model.backbone.type
    if not issubclass(MODELS.get(kind) or object, VisionTransformer):
        raise DenseSSLError(
            f'config {cfg.filename}: reference tokens need a ViT, and the backbone is '
            f'{kind}; use a config with VisionTransformer'
        )
    for name, head in cfg.model.heads.items():
        if head and getattr(MODELS.get(head.type), 'needs_points', False):
            if head.get('content'):
                raise DenseSSLError(
                    f'config {cfg.filename}: model.heads.{name}.content=True adds a '
                    'vector that the backbone does not hold; points are drawn for '
                    'content=False alone'
                )
            return head.to_dict()
    raise DenseSSLError(
        f'config {cfg.filename}: no points among the heads '
        f'({", ".join(cfg.model.heads)}); take a config with a PointHead, such as '
        'configs/quickstart/densedino_vit_demo.py'
    )


def _sheet(
    views: Sequence[View], head: PointHead, extractor: FeatureExtractor
) -> np.ndarray:
    """Blocks of `draw_pair` below each other, the first view with each other one."""
    blocks = []
    for number, view in enumerate(views[1:], 2):
        pair, names = (views[0], view), ('view 1', f'view {number}')
        places = place_pair(pair, head)
        if places is None:
            names = [f'{name}: no overlap' for name in names]
            blocks.append(draw_pair(pair, names, np.zeros((2, 0, 2)), ([], [])))
            continue
        weights = [
            reference_attention(extractor, one.pixels, at)
            for one, at in zip(pair, places, strict=True)
        ]
        blocks.append(draw_pair(pair, names, places.numpy(), weights))
    width = max(block.shape[1] for block in blocks)
    return np.concatenate([_padded(b, len(b), width) for b in blocks])


def place_pair(pair: tuple[View, View], head: PointHead) -> Tensor | None:
    """Points of a pair as the head draws them, uniform or on a grid in the overlap.

    Args:
        pair: two views of a picture.
        head: gives number and sampling of the points.

    Returns:
        ``(2, M, 2)`` fractions ``(x, y)`` of each view, or None without an overlap.
    """
    one, other = (view.geometry for view in pair)
    if not one.overlap_area(other) > 0:
        return None
    source = head.draw(one.overlap(other))
    return torch.stack([one.to_view(source), other.to_view(source)]).clamp(0, 1)


@torch.no_grad()
def reference_attention(
    extractor: FeatureExtractor, pixels: np.ndarray, places: Tensor
) -> np.ndarray:
    """Attention of points' reference tokens to the patches, last block, head mean.

    Args:
        extractor: of a `VisionTransformer`; put in evaluation mode.
        pixels: a view, uint8 RGB ``(H, W, 3)``.
        places: ``(M, 2)`` fractions ``(x, y)`` of the view.

    Returns:
        ``(M, h, w)``; with the token's share of itself, a point's weights sum to 1.
    """
    backbone = extractor.backbone.eval()
    image = torch.from_numpy(pixels).permute(2, 0, 1).to(extractor.device)
    image = (image - extractor.mean.to(image.device)) / extractor.std.to(image.device)
    h, w = (side // backbone.patch_size for side in image.shape[1:])
    tokens = backbone.position_embeddings_at(places[None].to(image.device), (h, w))
    weights = backbone.last_reference_attention(image[None], tokens)
    return weights[0, :, :, :-1].mean(0).unflatten(1, (h, w)).cpu().numpy()


def draw_pair(
    pair: tuple[View, View],
    names: Sequence[str],
    places: np.ndarray,
    weights: Sequence[np.ndarray],
) -> np.ndarray:
    """A row a point: both views with all points, its own large, then both its maps.

    Args:
        pair: the views.
        names: their titles.
        places: ``(2, M, 2)`` fractions ``(x, y)`` of each view; a point has one colour.
        weights: for each view ``(M, h, w)``, see `draw_attention`.

    Returns:
        Uint8 RGB on white. Cells have `GAP_PX` around them and columns a title; without
        points it is the row of the two views.
    """
    zoom = zoom_of(pair[0])
    height = max(len(view.pixels) for view in pair) * zoom
    count = places.shape[1]
    colours = place_colours((1, count)).tolist() if count else []
    marked, maps = [], []
    for view, at, shares in zip(pair, places, weights, strict=True):
        pixels = view.pixels.repeat(zoom, 0).repeat(zoom, 1)
        centres = at * pixels.shape[1::-1]
        cells = [pixels.copy() for _ in colours]
        for own, cell in enumerate(cells):
            for i, (centre, colour) in enumerate(zip(centres, colours, strict=True)):
                draw_dot(cell, centre, colour, *[_LARGE_DOT_PX] * (i == own))
        marked.append(cells or [pixels])
        cells = [draw_attention(pixels, share) for share in shares]
        for cell, centre, colour in zip(cells, centres, colours, strict=True):
            draw_dot(cell, centre, colour)
        maps.append(cells)
    titled = [*zip(names, marked, strict=True)]
    titled += [(f'attention in {n}', m) for n, m in zip(names, maps, strict=True) if m]
    columns = []
    for title, cells in titled:
        cells = [_padded(cell, height, cell.shape[1], GAP_PX) for cell in cells]
        columns.append(stack_titled({title: np.concatenate(cells)}))
    return np.concatenate(columns, 1)


def draw_attention(pixels: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Half the grey view, half the map in colours from black (0) to its largest weight.

    Args:
        pixels: uint8 RGB ``(H, W, 3)``.
        share: ``(h, w)`` weights, 0 or more; a cell is ``H / h`` times ``W / w`` px.

    Returns:
        Uint8 RGB ``(H, W, 3)``.
    """
    levels = (255 * share / share.max()).round().astype(np.uint8)
    heat = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[:, :, ::-1]
    heat = cv2.resize(heat, pixels.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[:, :, None]
    return (grey // 2 + heat // 2).astype(np.uint8)


def _padded(picture: np.ndarray, height: int, width: int, around: int = 0):
    """White below, to the right and around."""
    below, right = height - len(picture), width - picture.shape[1]
    sides = (around, around + below), (around, around + right), (0, 0)
    return np.pad(picture, sides, constant_values=255)
