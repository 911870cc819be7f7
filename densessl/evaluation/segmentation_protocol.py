"""Linear segmentation of a folder of pictures and masks, as one command runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.models.features import Tokens
from densessl.registry import EVALUATORS

from .features import FeatureExtractor, labelled_batches
from .linear_segmentation import LinearClassifier, LinearSegmentation
from .mask_pictures import evenly, save_masks
from .metrics import confusion_matrix, mean_iou, pixel_accuracy
from .protocol import Scores
from .segmentation_folder import LabelledFolder, check_masks, mask_pairs, read_mask
from .training_features import Cache, check_finite, training_features


@dataclass(frozen=True, kw_only=True)
class MaskProtocol:
    """What the protocols on pictures with masks share.

    The layouts of folders are those of `mask_pairs`. Pictures and masks are resized to
    ``size``, and predictions are compared with the masks at this size.

    Attributes:
        classes: names in label order, or their number, at most 255.
        size: side in px of the square pictures, or ``(H, W)``; multiples of the patch.
        val_split: the split that is scored.
        ignore: labels that do not count, beside 255.
        num_pictures: how many pictures of it are drawn with their masks.
        seed: of everything that is random.
    """

    classes: int | Sequence[str]
    size: int | Sequence[int] = 448
    val_split: str = 'val'
    ignore: Sequence[int] = ()
    num_pictures: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 < len(self.names) <= 255:
            raise DenseSSLError(
                f'{type(self).__name__}: {len(self.names)} classes; give 2 to 255'
            )

    @property
    def names(self) -> list[str]:
        """Names of the classes; their numbers where none were given."""
        if isinstance(self.classes, int):
            return [str(label) for label in range(self.classes)]
        return list(self.classes)

    def open(
        self, extractor: FeatureExtractor, data: Path, split: str
    ) -> LabelledFolder:
        """A split whose masks are all checked, its pictures as the backbone takes them.

        Raises:
            DenseSSLError: as `mask_pairs` and `check_masks`.
        """
        read = partial(read_mask, num_classes=len(self.names), ignore=self.ignore)
        size = pair_of(self.size)
        title = f'features of {split}'
        pairs = mask_pairs(data, split)
        folder = LabelledFolder(pairs, size, read, title, extractor.read)
        check_masks(folder, self.names, split)
        return folder

    def chosen(self, folder: LabelledFolder) -> dict[int, str]:
        """Names of the pictures that are drawn, by index."""
        indices = evenly(len(folder), self.num_pictures)
        return {index: folder.pairs[index][0].stem for index in indices}

    def settings(self) -> dict[str, Any]:
        """The attributes as plain values."""
        return {**asdict(self), 'classes': self.names}


@EVALUATORS.register_module()
@dataclass(frozen=True, kw_only=True)
class LinearSegmentationProtocol(MaskProtocol):
    """mIoU of a 1x1 convolution on frozen patch tokens; see `LinearSegmentation`.

    Metrics: ``miou``, ``pixel_accuracy`` and ``iou/CLASS``.

    Attributes:
        train_split: the split that the classifier is trained on, without augmentation.
        head: settings of `LinearSegmentation` by name, such as ``dict(lr=0.01)``.
        cache: where training features are; see `training_features`.
    """

    train_split: str = 'train'
    head: Mapping[str, Any] = field(default_factory=dict)
    cache: Cache = 'fp32'

    def __post_init__(self) -> None:
        super().__post_init__()
        self.linear()  # a wrong setting of the head is told at once

    def linear(self) -> LinearSegmentation:
        """The classifier's protocol."""
        return LinearSegmentation(len(self.names), seed=self.seed, **self.head)

    def run(self, extractor: FeatureExtractor, data: Path, out: Path) -> Scores:
        """Train, score and draw; see `EvaluationProtocol`."""
        train, val = (
            self.open(extractor, data, split)
            for split in (self.train_split, self.val_split)
        )
        classifier = self.learn(extractor, train)
        confusion = torch.zeros(len(self.names), len(self.names), dtype=torch.int64)
        pictures, first, stems = [], 0, self.chosen(val)
        for images, masks, tokens in extracted(extractor, val):
            pred = classifier.predict(tokens, val.size)
            masks = masks.to(pred.device)
            confusion += confusion_matrix(pred, masks, len(self.names)).cpu()
            pictures += save_masks(out, stems, first, images, masks, pred, self.names)
            first += len(images)
        miou, per_class = mean_iou(confusion)
        metrics = dict(miou=miou, pixel_accuracy=pixel_accuracy(confusion))
        metrics.update(by_class('iou', self.names, per_class))
        return Scores(metrics, self.about(train, val), pictures)

    def learn(
        self, extractor: FeatureExtractor, train: LabelledFolder
    ) -> LinearClassifier:
        """The classifier, trained on a split."""
        linear = self.linear()
        size = (linear.train_mask_size, linear.train_mask_size)
        features = training_features(extractor, train, size, self.cache)
        return linear.learn(features, extractor.device, 'epochs')

    def about(self, train: LabelledFolder, val: LabelledFolder) -> dict[str, Any]:
        """Settings, the classifier's defaults and the numbers of pictures included."""
        numbers = dict(num_train=len(train), num_val=len(val))
        return {**self.settings(), 'head': asdict(self.linear()), **numbers}


def extracted(
    extractor: FeatureExtractor, folder: LabelledFolder
) -> Iterator[tuple[Tensor, Tensor, Tokens]]:
    """Pictures ``(B, H, W, 3)``, masks ``(B, H, W)`` and tokens, batch by batch.

    Raises:
        DenseSSLError: features are not finite, or as `LabelledFolder`.
    """
    first = 0
    for images, masks in labelled_batches(folder, extractor.batch_size, 'validation'):
        tokens = extractor(images)
        check_finite(tokens.patches, first)
        first += len(images)
        yield images, masks, tokens


def by_class(metric: str, names: Sequence[str], values: Tensor) -> dict[str, float]:
    """``metric/CLASS`` of each class."""
    return {f'{metric}/{n}': v for n, v in zip(names, values.tolist(), strict=True)}


def pair_of(size: int | Sequence[int]) -> tuple[int, int]:
    """``(H, W)`` of a side or of both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
