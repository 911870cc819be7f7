"""Scores while the training goes on, at a bounded cost."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from torch import Tensor

from densessl.datasets import DemoScenes
from densessl.engine.checkpoint import write_atomically
from densessl.engine.distributed import unwrap
from densessl.errors import DenseSSLError
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
from densessl.interop.backbone import save_backbone
from densessl.registry import HOOKS

from .report import FEW_PICTURES, labelled_scenes, spread

BEST_FILE = 'best_dense.safetensors'
BEST_ABOUT = 'best_dense.json'
_TRIAL = 10  # the first probe's cost is foretold from this share of the pictures


@HOOKS.register_module()
class ProbeHook(Hook):
    """Every few epochs, scores the teacher on a small labelled set.

    Logs ``probe/miou`` of a linear segmentation and ``probe/knn``, the top-1 share of
    k-NN, and keeps the teacher's backbone of the best score (mIoU, else k-NN) as
    ``best_dense.safetensors``, with what it scored in ``best_dense.json``. Without
    labelled data the hook does nothing.

    The probes, with the reading of their pictures, take at most ``max_share`` of the
    training time. The cost of the first is foretold from a tenth of the pictures. A
    probe that would take more waits, and the interval grows.

    The training is what it would be without: no generator moves, and only the first
    process probes while the others wait for its next step.

    Args:
        segmentation: folder with ``images/{train,val}`` and ``annotations/{train,val}``
            or of VOC's layout (see `mask_pairs`); ``'demo'`` for built-in demo scenes.
        knn: folder with ``train/CLASS`` and ``val/CLASS``.
        interval: epochs between two probes; the last epoch has one too.
        max_share: of the training time, above 0; 1e9 sets no bound.
        size: side in px of all pictures; central crops for k-NN.
        train_pictures: most pictures to learn from, spread evenly over those there.
        val_pictures: most pictures to score on.
        ignore: labels of pixels that do not count, beside 255.
        k: neighbours.

    Raises:
        DenseSSLError: a number is out of range.
    """

    priority = 'LOWEST'  # after the checkpoint

    def __init__(
        self,
        segmentation: str | None = None,
        knn: str | None = None,
        *,
        interval: int = 5,
        max_share: float = 0.05,
        size: int = 224,
        train_pictures: int = 200,
        val_pictures: int = 100,
        ignore: Sequence[int] = (),
        k: int = 10,
    ) -> None:
        counts = dict(
            interval=interval,
            size=size,
            train_pictures=train_pictures,
            val_pictures=val_pictures,
            k=k,
        )
        for name, value in counts.items():
            if value < 1:
                raise DenseSSLError(f'ProbeHook: {name}={value}; give 1 or more')
        if not max_share > 0:
            raise DenseSSLError(
                f'ProbeHook: max_share={max_share}; give a share of the training time '
                'above 0, such as 0.05'
            )
        self.segmentation = segmentation
        self.knn = knn
        self.interval = interval
        self.max_share = max_share
        self.settings = dict(
            segmentation=segmentation,
            knn=knn,
            size=size,
            train_pictures=train_pictures,
            val_pictures=val_pictures,
            ignore=list(ignore),
            k=k,
        )
        self.best = -math.inf
        self.trained = 0.0
        """Seconds of training since the start or the resume."""
        self.spent = 0.0
        """Seconds of probes, with reading and trial."""
        self.cost: float | None = None
        """Seconds that a probe takes."""
        self._told = False

    @property
    def wanted(self) -> bool:
        """Whether there is anything to score on."""
        return bool(self.segmentation or self.knn)

    @master_only
    def before_train(self, runner) -> None:
        """Read the pictures, and after a resume what was best so far."""
        if not self.wanted:
            return
        start = self._clock()
        model = unwrap(runner.model)
        patch, size = model.teacher.backbone.patch_size, self.settings['size']
        if size % patch:
            raise DenseSSLError(
                f'ProbeHook: size={size} is not a multiple of the patch, {patch} px; '
                f'set default_hooks.probe.size={max(1, round(size / patch)) * patch}'
            )
        self.data = {}
        if self.segmentation:
            self.data['miou'] = _masked(**self.settings)
        if self.knn:
            self.data['knn'] = _classified(**self.settings)
        about = Path(runner.work_dir) / BEST_ABOUT
        if runner.iter and about.is_file():
            found = json.loads(about.read_text())
            if found['settings'] == self.settings:
                self.best = found['score']
        self._next = (runner.epoch // self.interval + 1) * self.interval
        self._first = runner.epoch
        self.spent += self._clock() - start

    def before_train_epoch(self, runner) -> None:
        """Take the time."""
        self._began = self._clock()

    @master_only
    def after_train_epoch(self, runner) -> None:
        """Probe, if it is time to and the time allows it."""
        self.trained += self._clock() - self._began
        done = runner.epoch + 1
        last = done == runner.max_epochs
        if not self.wanted or not (last or done >= self._next):
            return
        start = self._clock()
        model = unwrap(runner.model)
        extractor = FeatureExtractor(
            model.teacher.backbone, **model.data_preprocessor.normalization
        )
        if self.cost is None:
            self._score(extractor, trial=True)
            took = self._clock() - start
            self.spent += took
            self.cost = _TRIAL * took
            start = self._clock()
        if self.spent + self.cost > self.max_share * self.trained:
            self._wait(runner, done, last)
            return
        values = self._score(extractor)
        self._keep(runner, model, values)
        self.cost = self._clock() - start
        self.spent += self.cost
        self._next = done + self.interval
        share = self.spent / self.trained
        words = ', '.join(f'{name} {value:.1%}' for name, value in values.items())
        runner.logger.info(
            f'probe after epoch {done}: {words} ({self.cost:.1f} s; '
            f'{share:.1%} of the training time so far)'
        )
        logged = {f'probe/{name}': value for name, value in values.items()}
        logged |= {'probe/seconds': self.cost, 'probe/time_share': share}
        runner.visualizer.add_scalars(logged, step=runner.iter)

    def _score(self, extractor: FeatureExtractor, trial: bool = False) -> dict:
        """Scores by name; a trial takes a tenth of the pictures, and any label."""
        scores = {}
        for name, (train, val, classes) in self.data.items():
            if trial:
                train, val = (
                    [(image, label * 0) for image, label in part[::_TRIAL]]
                    for part in (train, val)
                )
            protocol = _miou if name == 'miou' else _top1
            scores[name] = protocol(extractor, train, val, classes, self.settings['k'])
        return scores

    def _wait(self, runner, done: int, last: bool) -> None:
        """Put the next probe off until it may take its time; say so once."""
        epoch = self.trained / (done - self._first)
        self.interval = max(
            self.interval, math.ceil(self.cost / (self.max_share * epoch))
        )
        missing = (self.spent + self.cost) / self.max_share - self.trained
        self._next = done + max(1, math.ceil(missing / epoch))
        if last or not self._told:
            runner.logger.warning(
                f'no probe after epoch {done}: one takes {self.cost:.1f} s, and '
                f'{self.max_share:.0%} of the training time so far is '
                f'{self.max_share * self.trained:.1f} s; '
                + ('' if last else f'the next one follows epoch {self._next}; ')
                + 'lower default_hooks.probe.train_pictures or raise max_share'
            )
        self._told = True

    def _keep(self, runner, model, values: dict[str, float]) -> None:
        """Save the teacher if no probe before was better."""
        metric = next(iter(values))
        if not values[metric] > self.best:
            return
        self.best = values[metric]
        folder = Path(runner.work_dir)
        write_atomically(
            folder / BEST_FILE,
            lambda partial: save_backbone(
                partial,
                model.teacher.backbone,
                runner.cfg.model.backbone,
                **model.data_preprocessor.normalization,
                steps=runner.iter,
            ),
        )
        about = dict(
            metric=f'probe/{metric}',
            score=self.best,
            steps=runner.iter,
            scores=values,
            settings=self.settings,
        )
        write_atomically(
            folder / BEST_ABOUT,
            lambda partial: partial.write_text(json.dumps(about, indent=2)),
        )

    def _clock(self) -> float:
        return time.perf_counter()


Labelled = tuple[list[tuple[Any, Any]], list[tuple[Any, Any]], int]
"""Training and validation pictures with their labels, and the number of classes."""


def _masked(
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


def _classified(
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


def _miou(
    extractor: FeatureExtractor,
    train: list[Sample],
    val: list[Sample],
    classes: int,
    _: int,
) -> float:
    """As in the report at the end."""
    return linear_segmentation(extractor, train, val, classes, **FEW_PICTURES).miou


def _top1(
    extractor: FeatureExtractor,
    train: list[tuple[Tensor, Tensor]],
    val: list[tuple[Tensor, Tensor]],
    _: int,
    k: int,
) -> float:
    bank, queries = (
        extractor.pooled(torch.stack([image for image, _ in part])).cpu()
        for part in (train, val)
    )
    labels, truth = (torch.stack([y for _, y in part]) for part in (train, val))
    found = knn_classify(queries, bank, labels, [min(k, len(bank))])
    return (found[0] == truth).double().mean().item()
