"""Linear segmentation: what a 1x1 convolution reads from frozen patch tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.evaluation.features import FeatureExtractor, Sample, labelled_batches
from densessl.evaluation.metrics import (
    check_labels,
    confusion_matrix,
    mean_iou,
    pixel_accuracy,
)
from densessl.evaluation.progress import progress
from densessl.evaluation.training_features import (
    Cache,
    TrainingFeatures,
    check_finite,
    keep_features,
    resize_nearest,
    training_features,
)
from densessl.models.features import Tokens

_LOGITS_AT_ONCE = 2**24  # 64 MiB of float32 while full-size masks are predicted


@dataclass(frozen=True)
class SegmentationResult:
    """Score of one linear segmentation.

    Attributes:
        miou: mean IoU in 0..1 over the classes that occur in the validation set.
        per_class: IoU in 0..1 of each class; NaN for a class that does not occur.
        pixel_accuracy: share of the counted pixels with the right class, in 0..1.
        settings: what the score depends on beside the backbone: the protocol,
            precision, and the numbers, sizes and patch grid of the pictures.
    """

    miou: float
    per_class: tuple[float, ...]
    pixel_accuracy: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class LinearClassifier:
    """A trained 1x1 convolution on patch tokens: ``((x - shift) / scale) W + b``.

    Attributes:
        weight: ``(D, C)`` float32 ``W``.
        bias: ``(C,)`` ``b``.
        shift: ``(D,)`` mean of the training tokens, or zeros.
        scale: ``(D,)`` standard deviation of the training tokens, or ones.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    scale: Tensor

    def logits(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, C, h, w)`` class scores of ``(B, h * w, D)`` tokens in raster order."""
        patches = (patches.to(self.weight) - self.shift) / self.scale
        return (patches @ self.weight + self.bias).mT.unflatten(2, grid)

    @torch.no_grad()
    def predict(self, features: Tokens, size: tuple[int, int]) -> Tensor:
        """``(B, H, W)`` int64 classes at ``size = (H, W)`` pixels."""
        at_once = max(1, _LOGITS_AT_ONCE // (len(self.bias) * size[0] * size[1]))
        return torch.cat(
            [
                resize_bilinear(self.logits(part, features.grid), size).argmax(1)
                for part in features.patches.split(at_once)
            ]
        )


@dataclass(frozen=True)
class LinearSegmentation:
    """The linear segmentation protocol; the defaults are the published VOC setting.

    A 1x1 convolution on frozen patch tokens is trained by SGD with momentum 0.9; the
    learning rate falls tenfold after four fifths of the epochs (20 of 25). Its logits
    are resized bilinearly to masks of ``train_mask_size`` for the cross-entropy, and
    to the full masks for the evaluation. The problem is convex, so training starts
    from zero weights and only the order of the pictures is random.

    Backbones end at very different scales, untrained ones and ViTs without a final
    LayerNorm above all, and one learning rate cannot suit them all. Each channel is
    therefore standardised by its mean and standard deviation over all training
    tokens, which is a frozen BatchNorm without parameters: the score does not depend
    on the offset and scale of a channel. ``standardize=False`` is the bare published
    protocol.

    Attributes:
        num_classes: ``C``; labels run from 0 to ``C - 1``.
        epochs: passes over the training pictures.
        batch_size: pictures in one step.
        lr: learning rate at batch 60; the one used is ``lr * batch_size / 60``.
        weight_decay: L2 penalty on weights and biases.
        train_mask_size: side in pixels of the square masks in training.
        ignore_index: label of pixels that count neither in training nor evaluation.
        standardize: standardise every channel of the tokens.
        seed: seeds the order of the pictures.
    """

    num_classes: int
    epochs: int = 25
    batch_size: int = 60
    lr: float = 0.01
    weight_decay: float = 1e-4
    train_mask_size: int = 100
    ignore_index: int = 255
    standardize: bool = True
    seed: int = 0

    def fit(
        self,
        features: Tokens,
        masks: Tensor,
        device: torch.device | str | None = None,
    ) -> LinearClassifier:
        """Train the classifier on features that are already there.

        Args:
            features: tokens ``(M, N, D)`` of ``M`` training pictures, any float type.
            masks: ``(M, H, W)`` labels of the same pictures, any integer type and
                size; they are resized to ``train_mask_size`` (nearest).
            device: where to train, batch by batch; None for where the tokens are.

        Returns:
            The classifier, on ``device``.

        Raises:
            DenseSSLError: numbers differ, features are not finite, a label is outside
                the range, or no pixel has a label.
        """
        self._check(features.patches, masks)
        masks = resize_nearest(masks, (self.train_mask_size, self.train_mask_size))
        kept = keep_features(features.patches, features.grid, masks)
        return self.learn(kept, features.patches.device if device is None else device)

    @torch.enable_grad()
    def learn(
        self,
        features: TrainingFeatures,
        device: torch.device | str,
        title: str | None = None,
    ) -> LinearClassifier:
        """Train the classifier on features with masks of ``train_mask_size``.

        Args:
            features: with integer labels ``(M, s, s)``, ``s`` the ``train_mask_size``.
            device: where to train, batch by batch.
            title: of the epochs, to show their progress; None shows none.

        Returns:
            The classifier, on ``device``.

        Raises:
            DenseSSLError: a label is outside the range, or no pixel has a label.
        """
        masks, size = features.labels, features.labels.shape[1:]
        labelled = check_labels(masks, self.num_classes, self.ignore_index).any()
        self.check_labelled(labelled, 'training')
        shift, scale = features.shift, features.scale
        if not self.standardize:
            shift, scale = torch.zeros_like(shift), torch.ones_like(scale)
        weight = torch.zeros(len(shift), self.num_classes, device=device)
        bias = torch.zeros(self.num_classes, device=device)
        classifier = LinearClassifier(
            weight.requires_grad_(),
            bias.requires_grad_(),
            shift.to(weight),
            scale.to(weight),
        )
        optimizer = torch.optim.SGD(
            [weight, bias],
            lr=self.lr * self.batch_size / 60,
            momentum=0.9,
            weight_decay=self.weight_decay,
        )
        drop = torch.optim.lr_scheduler.StepLR(optimizer, max(1, self.epochs * 4 // 5))
        rng = np.random.default_rng(self.seed)
        epochs = range(self.epochs)
        for _ in epochs if title is None else progress(epochs, self.epochs, title):
            order = torch.from_numpy(rng.permutation(len(masks)))
            for chosen in order.split(self.batch_size):
                target = masks[chosen.to(masks.device)].to(device).long()
                tokens = features.patches(chosen).to(device)
                logits = classifier.logits(tokens, features.grid)
                logits = resize_bilinear(logits, size)
                loss = F.cross_entropy(logits, target, ignore_index=self.ignore_index)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            drop.step()
        weight.requires_grad_(False)
        bias.requires_grad_(False)
        return classifier

    def evaluate(
        self, classifier: LinearClassifier, features: Tokens, masks: Tensor
    ) -> Tensor:
        """``(C, C)`` confusion matrix of ``(B, N, D)`` tokens and ``(B, H, W)`` masks.

        Predictions are made at the size of the masks. Matrices of batches add up.

        Raises:
            DenseSSLError: numbers differ, features are not finite, or a label is
                outside the range.
        """
        self._check(features.patches, masks)
        pred = classifier.predict(features, (masks.shape[1], masks.shape[2]))
        masks = masks.to(pred.device)
        return confusion_matrix(pred, masks, self.num_classes, self.ignore_index)

    def _check(self, patches: Tensor, masks: Tensor) -> None:
        if len(patches) != len(masks) or not len(masks):
            raise DenseSSLError(
                f'LinearSegmentation: features of {len(patches)} pictures and '
                f'{len(masks)} masks; give one mask for each picture, and at least one'
            )
        check_labels(masks, self.num_classes, self.ignore_index)
        check_finite(patches)

    def check_labelled(self, labelled: Tensor, name: str) -> None:
        """Refuse a set that labels no pixel."""
        if not labelled:
            raise DenseSSLError(
                f'LinearSegmentation: the {name} masks label no pixel; '
                f'every label is {self.ignore_index}, the ignored one'
            )


def linear_segmentation(
    extractor: FeatureExtractor,
    train_samples: Iterable[Sample],
    val_samples: Iterable[Sample],
    num_classes: int,
    *,
    cache: Cache = 'fp32',
    **options: Any,
) -> SegmentationResult:
    """Linear segmentation of frozen features, from pictures to the score.

    Every picture goes through the backbone once, and training features stay in memory
    (``M * N * D`` values), unless ``cache`` is ``'none'``; validation features do only
    for their batch. The same seed, samples and machine give the same result.

    Args:
        extractor: the frozen backbone.
        train_samples: pairs of an ``(H, W, 3)`` uint8 RGB picture and its ``(H, W)``
            integer labels, all of one size.
        val_samples: the same for the evaluation, made at full mask size.
        num_classes: ``C``; labels run from 0 to ``C - 1``.
        cache: see `training_features`; for ``'none'``, give ``train_samples`` as a
            sequence.
        **options: further settings of `LinearSegmentation`, by name.

    Returns:
        mIoU, IoU per class, pixel accuracy and all settings.

    Raises:
        DenseSSLError: a mask has another size than its picture, pictures differ in
            size or do not fit the patch, a label is outside the range, a set is empty
            or unlabelled, or features are not finite.
    """
    protocol = LinearSegmentation(num_classes, **options)
    size = (protocol.train_mask_size, protocol.train_mask_size)

    def check(labels: Tensor) -> None:
        check_labels(labels, num_classes, protocol.ignore_index)

    features = training_features(extractor, train_samples, size, cache, check)
    classifier = protocol.learn(features, extractor.device)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    num_val = 0
    for images, labels in labelled_batches(
        val_samples, extractor.batch_size, 'validation'
    ):
        confusion += protocol.evaluate(classifier, extractor(images), labels).cpu()
        num_val += len(images)
    protocol.check_labelled(confusion.any(), 'validation')
    miou, per_class = mean_iou(confusion)
    patch = extractor.backbone.patch_size
    settings = {
        **asdict(protocol),
        'cache': cache,
        'precision': extractor.precision,
        'num_train': len(features.labels),
        'num_val': num_val,
        'train_size': tuple(patch * side for side in features.grid),
        'val_size': tuple(images.shape[1:3]),
        'grid': features.grid,
    }
    return SegmentationResult(
        miou, tuple(per_class.tolist()), pixel_accuracy(confusion), settings
    )


def resize_bilinear(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """``(B, C, h, w)`` to ``(B, C, *size)``, half-pixel centres, edges repeated.

    Equal to `torch.nn.functional.interpolate`, as two small matrix products: about
    three times as fast on a CPU with the gradient, and deterministic on a GPU.
    """
    rows, columns = (
        F.interpolate(
            torch.eye(old).to(logits)[None],
            size=new,
            mode='linear',
            align_corners=False,
        )[0]
        for old, new in zip(logits.shape[2:], size, strict=True)
    )
    return rows.mT @ logits @ columns
