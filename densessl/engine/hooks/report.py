"""What a run leaves behind: a score, a curve and a picture of its features."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from torch import nn

from densessl.datasets import DemoScenes, UnreadableImageError
from densessl.datasets.channels import resize_channels
from densessl.engine.distributed import unwrap
from densessl.evaluation import FeatureExtractor, linear_segmentation
from densessl.evaluation.features import Sample
from densessl.registry import HOOKS, MODELS
from densessl.visualization import save_curves, save_pca


def untrained_backbone(config: dict, seed: int) -> nn.Module:
    """A backbone as its constructor draws it from a seed; torch's generator stays."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS.build(config)


# Few pictures want more and longer steps than the protocol's to converge.
FEW_PICTURES = dict(epochs=30, batch_size=20, lr=1.0, train_mask_size=32)


@HOOKS.register_module()
class ReportHook(Hook):
    """At the end of a run, compares the teacher with the same network untrained.

    Draws ``curve.png`` and ``features.png`` (patch features in colours, by PCA) into
    the work dir. With ``probe``, also trains a linear segmentation of built-in,
    labelled demo scenes on the frozen features of both (see
    :func:`densessl.evaluation.linear_segmentation`), prints the two mIoU and writes
    them with all settings to ``report.json``; not for networks of other pictures than
    RGB of 8 bits, which the scenes are.

    Args:
        probe: whether to score.
        train_scenes: labelled scenes to train the linear classifier on.
        val_scenes: labelled scenes to score it on.
        size: side of the scenes in pixels.
        pictures: pictures in ``features.png``, from the training data where it is a
            folder, else demo scenes.
    """

    priority = 'LOWEST'

    def __init__(
        self,
        probe: bool = False,
        train_scenes: int = 200,
        val_scenes: int = 100,
        size: int = 128,
        pictures: int = 6,
    ) -> None:
        self.probe = probe
        self.train_scenes = train_scenes
        self.val_scenes = val_scenes
        self.size = size
        self.pictures = pictures

    @master_only
    def after_train(self, runner) -> None:
        """Score, draw and print."""
        folder = Path(runner.work_dir)
        model = unwrap(runner.model)
        normalization = model.data_preprocessor.normalization
        untrained = untrained_backbone(runner.cfg.model.backbone, runner.seed)
        untrained.to(next(model.parameters()).device)
        extractors = {
            'untrained': FeatureExtractor(untrained, **normalization),
            'trained': FeatureExtractor(model.teacher.backbone, **normalization),
        }
        logs = sorted(folder.glob('*/vis_data/scalars.json'))
        save_curves(logs, folder / 'curve.png')
        pictures = self._pictures(runner.train_dataloader.dataset)
        save_pca(folder / 'features.png', extractors, pictures, per_row=2)
        runner.logger.info(f'wrote {folder / "curve.png"}, {folder / "features.png"}')
        if not self.probe:
            return
        if not extractors['trained'].takes_rgb:
            runner.logger.info(
                'no score on demo scenes: they are RGB of 8 bits, and the network has '
                'other pictures'
            )
            return
        scores = {
            name: self._score(extractor) for name, extractor in extractors.items()
        }
        (folder / 'report.json').write_text(json.dumps(scores, indent=2))
        runner.logger.info(
            f'linear segmentation of demo scenes, mIoU: trained '
            f'{scores["trained"]["miou"]:.1%}, the same network untrained '
            f'{scores["untrained"]["miou"]:.1%}'
        )

    def _score(self, extractor: FeatureExtractor) -> dict:
        train = DemoScenes(self.train_scenes, self.size, seed=1_000_001)
        val = DemoScenes(self.val_scenes, self.size, seed=1_000_002)
        result = linear_segmentation(
            extractor,
            labelled_scenes(train),
            labelled_scenes(val),
            len(DemoScenes.CLASSES),
            **FEW_PICTURES,
        )
        return dict(
            miou=result.miou,
            pixel_accuracy=result.pixel_accuracy,
            per_class={
                name: None if math.isnan(iou) else iou  # no such pixels
                for name, iou in zip(DemoScenes.CLASSES, result.per_class, strict=True)
            },
            settings=result.settings,
        )

    def _pictures(self, dataset) -> list[np.ndarray]:
        """Evenly spaced pictures of the training data, square, ``(H, W, C)``."""
        indices = spread(len(dataset), self.pictures)
        if isinstance(dataset, DemoScenes):
            return [DemoScenes(seed=0, size=self.size).scene(i).image for i in indices]
        pictures = []
        for i in indices:
            try:
                image = dataset.picture(i)
            except UnreadableImageError:
                continue
            side = min(image.shape[:2])
            top, left = ((n - side) // 2 for n in image.shape[:2])
            square = image[top : top + side, left : left + side]
            pictures.append(
                resize_channels(square, (self.size, self.size), cv2.INTER_AREA)
            )
        return pictures


def labelled_scenes(scenes: DemoScenes) -> Iterator[Sample]:
    """Pictures and labels of demo scenes."""
    for i in range(len(scenes)):
        scene = scenes.scene(i)
        yield scene.image, scene.labels


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, evenly from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).astype(int).tolist()
