"""Linear classification of many small sets by logistic regression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.registry import EVALUATORS

from .features import FeatureExtractor
from .labelled import CentreCrops, LabelledImages, pooled_features, read_split
from .logistic import fit_logistic, search_strength
from .protocol import Scores, score_settings
from .scores import accuracy, map_11_point, mean_per_class, roc_auc

SETS = dict(
    food101='accuracy',
    cifar10='accuracy',
    cifar100='accuracy',
    sun397='accuracy',
    cars='accuracy',
    aircraft='mean_per_class',
    voc2007='map_11_point',
    dtd='accuracy',
    pets='mean_per_class',
    caltech101='mean_per_class',
    flowers='mean_per_class',
    mnist='accuracy',
    fer2013='accuracy',
    stl10='accuracy',
    gtsrb='accuracy',
    pcam='accuracy',
    ucf101='accuracy',
    hatefulmemes='roc_auc',
)
"""The sets of the published suite by their folders' names, and their metrics."""
METRICS: dict[str, Callable[[Tensor, Tensor], float]] = dict(
    accuracy=accuracy,
    mean_per_class=mean_per_class,
    map_11_point=map_11_point,
    roc_auc=roc_auc,
)


class _Split(NamedTuple):
    features: Tensor  # (M, P)
    targets: Tensor  # (M,) classes, or (M, C) of 1, 0 and -1


@EVALUATORS.register_module()
@dataclass(frozen=True)
class LinearSuite:
    """Logistic regression on frozen features, set by set (CLIP, arXiv:2103.00020).

    The strength C is searched on a validation split, the classifier is trained again
    on training and validation pictures with the best C, and scored on the test split.
    A set with ``test`` and no ``val``, or with ``val`` and no ``test`` (which is then
    the test), has its validation split cut from the training pictures.

    Attributes:
        sets: folders in the data folder; None: all that have training pictures.
        metric: of sets that `SETS` does not know.
        holdout: share in (0, 1) of each class that is cut off for validation.
        max_iterations: of L-BFGS.
        dtype: of the regression.
        seed: of the cut.
        resize: px of the shorter side before the crop.
        crop: side of the central crop in px.
        num_workers: processes that read pictures, on each rank.

    Raises:
        DenseSSLError: an unknown metric or type, or a share out of range.
    """

    sets: Sequence[str] | None = None
    metric: Literal['accuracy', 'mean_per_class', 'map_11_point', 'roc_auc'] = (
        'accuracy'
    )
    holdout: float = 0.2
    max_iterations: int = 1000
    dtype: Literal['float64', 'float32'] = 'float64'
    seed: int = 0
    resize: int = 224
    crop: int = 224
    num_workers: int = 4

    distributed = True

    def __post_init__(self) -> None:
        if self.metric not in METRICS or self.dtype not in ('float64', 'float32'):
            raise DenseSSLError(
                f'LinearSuite: metric={self.metric!r}, dtype={self.dtype!r}; choose '
                f'from {", ".join(METRICS)}, and float64 or float32'
            )
        if not 0 < self.holdout < 1:
            raise DenseSSLError(
                f'LinearSuite: holdout={self.holdout}; give a share such as 0.2'
            )

    def run(self, extractor: FeatureExtractor, data: Path, out: Path) -> Scores:
        """Score on ``data``, one set, or on the sets in it.

        Raises:
            DenseSSLError: there is no set, or one is not as it needs to be.
        """
        folders = self._folders(Path(data))
        metrics, found = {}, {}
        for folder in folders:
            name = SETS.get(folder.name, self.metric)
            key = f'{folder.name}_{name}'
            metrics[key], found[folder.name] = self._score(extractor, folder, name)
        if len(folders) > 1:
            metrics = dict(mean=float(np.mean(list(metrics.values())))) | metrics
        return Scores(metrics, score_settings(self) | dict(found=found))

    def _folders(self, data: Path) -> list[Path]:
        if self.sets is not None:
            folders = [data / name for name in self.sets]
        elif _has(data, 'train'):
            folders = [data.resolve()]
        else:
            folders = [f for f in sorted(data.iterdir()) if _has(f, 'train')]
        lost = [str(folder) for folder in folders if not _has(folder, 'train')]
        if lost or not folders:
            raise DenseSSLError(
                f'{", ".join(lost) or data}: no train/CLASS/ and no train.txt; give '
                'the folder of a set, or one that holds sets, by --data'
            )
        return folders

    def _score(
        self, extractor: FeatureExtractor, folder: Path, name: str
    ) -> tuple[float, dict[str, Any]]:
        """The metric of a set, and what was found on the way."""
        metric = METRICS[name]
        train = _read(folder, 'train', None, name)
        last = 'test' if _has(folder, 'test') else 'val'
        test = _read(folder, last, train.classes, name)
        val = None
        if last == 'test' and _has(folder, 'val'):
            val = _read(folder, 'val', train.classes, name)

        def features(split: LabelledImages, title: str) -> _Split:
            crops = CentreCrops(split.paths, self.resize, self.crop)
            title = f'{folder.name} {title}'
            vectors = pooled_features(extractor, crops, self.num_workers, title)
            vectors = vectors.to(extractor.device, getattr(torch, self.dtype))
            return _Split(vectors, split.labels)

        whole, tested = features(train, 'train'), features(test, last)
        if val is None:
            held = _held_out(train.labels, self.holdout, self.seed)
            parts = [_Split(*(x[mask] for x in whole)) for mask in (~held, held)]
        else:
            parts = [whole, features(val, 'val')]
            whole = _Split(*map(torch.cat, zip(*parts, strict=True)))
        iterations = []

        def score(strength: float, train: _Split, test: _Split) -> float:
            classifier = fit_logistic(
                *train,
                strength,
                len(train_classes),
                max_iterations=self.max_iterations,
            )
            iterations.append(classifier.iterations)
            return metric(classifier(test.features).cpu(), test.targets)

        train_classes = train.classes
        best, searched = search_strength(lambda strength: score(strength, *parts))
        final = score(best, whole, tested)
        return final, dict(
            C=best,
            validation_scores={f'{c:.3g}': value for c, value in searched.items()},
            iterations=max(iterations),
            split=last,
            num_train=len(parts[0].targets),
            num_val=len(parts[1].targets),
            num_test=len(tested.targets),
            num_classes=len(train_classes),
            feature_dims=whole.features.shape[1],
        )


def _has(folder: Path, split: str) -> bool:
    return (folder / split).is_dir() or (folder / f'{split}.txt').is_file()


def _read(
    folder: Path, split: str, classes: Sequence[str] | None, metric: str
) -> LabelledImages:
    """A split from its class folders or its list, with targets for the metric."""
    several = metric == 'map_11_point'
    if (folder / split).is_dir() or not (folder / f'{split}.txt').is_file():
        images = read_split(folder, split, classes)
        if several:
            one_hot = F.one_hot(images.labels, len(images.classes))
            images = replace(images, labels=one_hot)
    else:
        images = read_label_list(folder, split, classes)
        if not several:
            images = replace(images, labels=_single(images, folder / f'{split}.txt'))
    number = len(images.classes)
    if number < 2 or (metric == 'roc_auc' and number != 2):
        raise DenseSSLError(
            f'{folder}: {number} class(es) for {metric}; it needs '
            f'{"2" if metric == "roc_auc" else "2 or more"}'
        )
    return images


def read_label_list(
    folder: Path, split: str, classes: Sequence[str] | None = None
) -> LabelledImages:
    """Pictures of ``folder/split.txt``, each with any number of classes.

    A line is ``PICTURE<TAB>CLASS<TAB>CLASS...``, the picture relative to the folder;
    ``?CLASS`` leaves the picture out for that class (VOC's difficult objects).

    Args:
        folder: of the set.
        split: name of the list.
        classes: the classes there may be, in order; None: those that are found.

    Returns:
        With ``(M, C)`` labels: 1, 0, and -1 for a class that is left out.

    Raises:
        DenseSSLError: a picture is missing, or a class unknown.
    """
    path = folder / f'{split}.txt'
    lines = [line.split('\t') for line in path.read_text().splitlines() if line.strip()]
    if classes is None:
        classes = sorted({word.lstrip('?') for _, *words in lines for word in words})
    labels = torch.zeros(len(lines), len(classes), dtype=torch.int64)
    for number, (picture, *words) in enumerate(lines):
        if not (folder / picture).is_file():
            raise DenseSSLError(
                f'{path}, line {number + 1}: no such picture {folder / picture}; lines '
                'are PICTURE, a tab, and classes with tabs between them'
            )
        for word in words:
            if word.lstrip('?') not in classes:
                raise DenseSSLError(
                    f'{path}, line {number + 1}: class {word!r} is none of the '
                    f'training pictures; mend the line'
                )
            labels[number, classes.index(word.lstrip('?'))] = 1 - 2 * (word[0] == '?')
    if not lines:
        raise DenseSSLError(f'{path}: no pictures; add some')
    paths = [str(folder / picture) for picture, *_ in lines]
    return LabelledImages(paths, labels, list(classes))


def _single(images: LabelledImages, path: Path) -> Tensor:
    """The one class of every picture."""
    wrong = ((images.labels != 0).sum(1) != 1) | (images.labels < 0).any(1)
    if wrong.any():
        raise DenseSSLError(
            f'{path}, line {int(wrong.nonzero()[0]) + 1}: not exactly one class; for '
            'sets with several give --cfg-options protocol.metric=map_11_point'
        )
    return images.labels.argmax(1)


def _held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Which pictures to hold out: that share of each class, drawn at random.

    A class of one picture keeps it; with several labels a picture, all of them count as
    one class.
    """
    rng = np.random.default_rng(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    groups = labels if labels.ndim == 1 else torch.zeros(len(labels))
    for value in groups.unique():
        members = (groups == value).nonzero()[:, 0].numpy()
        count = max(1, round(share * len(members))) if len(members) > 1 else 0
        held[rng.permutation(members)[:count]] = True
    if not held.any() or held.all():
        raise DenseSSLError(
            f'{len(labels)} training pictures are too few to cut a validation split '
            'off; give two or more of a class, or a val folder'
        )
    return held
