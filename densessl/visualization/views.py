"""What the commands of ``tools/visualize.py`` share: views, weights and PNG files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from mmengine.config import Config

from densessl.datasets.transforms.multi_crop import MultiCrop, ViewRecipe
from densessl.errors import DenseSSLError
from densessl.evaluation import FeatureExtractor
from densessl.evaluation.loading import (
    backbone_weights,
    build_part,
    normalization_of,
    read_run,
)
from densessl.geometry import ViewGeometry
from densessl.interop.backbone import BACKBONE_FILE, load_strictly, read_backbone
from densessl.registry import TRANSFORMS

VIEW_PX = 256
"""Views smaller than this are enlarged by a whole number."""


_KINDS = f'step_*.pth or {BACKBONE_FILE} of a work dir'


class View(NamedTuple):
    """A view: uint8 RGB ``(H, W, 3)``, and where it lies, of shape ``()``."""

    pixels: np.ndarray
    geometry: ViewGeometry


def zoom_of(view: View) -> int:
    """The whole number by which a view is enlarged."""
    return -(-VIEW_PX // max(view.pixels.shape))


def view_config(cfg: Config) -> dict:
    """The one transform of a config that cuts views.

    Raises:
        DenseSSLError: there is none, or more than one.
    """
    crops = [t for t in cfg.train_dataloader.dataset.pipeline if 'views' in t]
    if len(crops) != 1:
        raise DenseSSLError(
            f'config {cfg.filename}: {len(crops)} transforms that cut views; one '
            'is needed, such as MultiCrop'
        )
    return crops[0]


def plain_recipes(crop: dict) -> list[ViewRecipe]:
    """Recipes of a transform, with the views' colours left."""
    colours_left = dict(jitter=0, grayscale=0, blur=0, solarize=0)
    recipes = map(ViewRecipe.from_config, crop['views'])
    return [replace(recipe, **colours_left) for recipe in recipes]


def plain_crop(cfg: Config, size: int | None) -> MultiCrop:
    """The config's views of its first role, two or more, with their colours left."""
    crop = view_config(cfg)
    if size is not None and size < 1:
        raise DenseSSLError(f'--size {size}: give px, 1 or more')
    recipes = plain_recipes(crop)
    plain = [
        replace(recipe, size=size or recipe.size)
        for recipe in recipes
        if recipe.role == recipes[0].role
    ]
    if sum(recipe.count for recipe in plain) < 2:
        plain[0] = replace(plain[0], count=2)
    return TRANSFORMS.build(dict(crop, views=plain))


def cut_views(
    crop: MultiCrop, image: np.ndarray, rng: np.random.Generator
) -> dict[str, list[View]]:
    """All views of a picture, by role."""
    results = crop(dict(img=image, rng=rng))
    geometry = iter(results['geometry'][i] for i in range(crop.num_views))
    return {
        role: [
            View(pixels, next(geometry))
            for pixels in stack.permute(0, 2, 3, 1).contiguous().numpy()
        ]
        for role, stack in results['inputs'].items()
    }


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """State dict of a run's checkpoint.

    Raises:
        DenseSSLError: it is none, or cannot be read.
    """
    need_file(path)
    return read_run(path, _KINDS)['state_dict']


def need_file(path: Path) -> None:
    """Raise a `DenseSSLError` where there is no checkpoint."""
    if not path.is_file():
        raise DenseSSLError(f'checkpoint {path}: no such file; give {_KINDS}')


def extractors(cfg: Config, path: Path) -> tuple[FeatureExtractor, FeatureExtractor]:
    """Student and teacher of a run, or a backbone's file in both places."""
    need_file(path)
    if path.suffix == '.safetensors':
        state, about = read_backbone(path)
        both = _extractor(cfg, state, path, about['mean'], about['std'])
        return both, both
    weights = read_weights(path)
    normalization = normalization_of(cfg, f'config {cfg.filename}')
    student, teacher = (
        _extractor(cfg, backbone_weights(weights, role), path, **normalization)
        for role in ('student', 'teacher')
    )
    return student, teacher


def check_size(backbone: torch.nn.Module, size: tuple[int, int]) -> None:
    """Tokens must cover the view exactly, or their places are not known."""
    stride = backbone.patch_size
    if size[0] % stride or size[1] % stride:
        raise DenseSSLError(
            f'views of {size[0]}x{size[1]} px: tokens of this backbone are {stride} px '
            f'apart; give a multiple of {stride} by --size'
        )


def write_sheet(path: Path, sheet: np.ndarray) -> None:
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


def _extractor(cfg: Config, state: dict, path: Path, mean, std) -> FeatureExtractor:
    backbone = build_part(cfg.model.backbone, f'config {cfg.filename}')
    load_strictly(backbone, state, f'checkpoint {path}')
    extractor = FeatureExtractor(backbone, mean, std)
    if not extractor.takes_rgb:
        raise DenseSSLError(
            f'checkpoint {path}: views are drawn of RGB pictures of 8 bits, and it has '
            f'{len(mean)} channels; draw it by attention, pca or similarity'
        )
    return extractor
