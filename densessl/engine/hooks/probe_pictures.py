"""Labelled pictures of the probe, and the scores of a backbone on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densessl.datasets import DemoScenes
from densessl.evaluation import FeatureExtractor, linear_segmentation
from densessl.evaluation.features import Sample
from densessl.evaluation.knn import knn_classify
from densessl.evaluation.labelled import CentreCrops, read_split
from densessl.evaluation.segmentation_folder import (
    IGNORED,
    LabelledFolder,
    mask_pairs,
    read_mask,
)

from .report import FEW_PICTURES, labelled_scenes, spread

Labelled = tuple[list[tuple[Any, Any]], list[tuple[Any, Any]], int]
"""Training and validation pictures with their labels, and the number of classes."""


def read_masked(
    segmentation: str,
    size: int,
    train_pictures: int,
    val_pictures: int,
    ignore: Sequence[int],
    **_: Any,
) -> Labelled:
    """Pictures with masks, from a folder or drawn."""
    if segmentation == 'demo':  # other scenes than those of ReportHook
        parts = [
            list(labelled_scenes(DemoScenes(train_pictures, size, 1_000_003))),
            list(labelled_scenes(DemoScenes(val_pictures, size, 1_000_004))),
        ]
        return *parts, len(DemoScenes.CLASSES)
    parts, read = [], partial(read_mask, num_classes=IGNORED, ignore=ignore)
    for split, most in (('train', train_pictures), ('val', val_pictures)):
        pairs = mask_pairs(Path(segmentation), split)
        pairs = [pairs[i] for i in spread(len(pairs), most)]
        folder = LabelledFolder(pairs, (size, size), read)
        parts.append([folder[i] for i in range(len(pairs))])
    labels = [label[label != IGNORED] for part in parts for _, label in part]
    greatest = max((int(label.max()) for label in labels if label.size), default=0)
    return *parts, greatest + 1


def read_classified(
    knn: str, size: int, train_pictures: int, val_pictures: int, **_: Any
) -> Labelled:
    """Pictures with classes, from class folders."""
    train = read_split(Path(knn), 'train')
    val = read_split(Path(knn), 'val', train.classes)
    parts = []
    for split, most in ((train, train_pictures), (val, val_pictures)):
        crops = CentreCrops(split.paths, size, size)
        chosen = spread(len(crops), most)
        parts.append([(crops[i], split.labels[i]) for i in chosen])
    return *parts, len(train.classes)


def miou(
    extractor: FeatureExtractor,
    train: list[Sample],
    val: list[Sample],
    classes: int,
    _: int,
) -> float:
    """As in the report at the end."""
    return linear_segmentation(extractor, train, val, classes, **FEW_PICTURES).miou


def top1(
    extractor: FeatureExtractor,
    train: list[tuple[Tensor, Tensor]],
    val: list[tuple[Tensor, Tensor]],
    _: int,
    k: int,
) -> float:
    """Share of the validation pictures whose class k-NN finds."""
    bank, queries = (
        extractor.pooled(torch.stack([image for image, _ in part])).cpu()
        for part in (train, val)
    )
    labels, truth = (torch.stack([y for _, y in part]) for part in (train, val))
    found = knn_classify(queries, bank, labels, [min(k, len(bank))])
    return (found[0] == truth).double().mean().item()
