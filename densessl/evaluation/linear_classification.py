"""Linear classification by SGD: several learning rates on the same features."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce, get_dist_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from densessl.datasets.image_io import open_image
from densessl.datasets.transforms import MultiCrop
from densessl.errors import DenseSSLError
from densessl.registry import EVALUATORS

from .features import FeatureExtractor
from .labelled import CentreCrops, LabelledImages, pooled_features, read_split
from .progress import progress
from .protocol import Scores, score_settings


@EVALUATORS.register_module()
@dataclass(frozen=True)
class LinearClassification:
    """Softmax regression on frozen features by SGD (DINO, arXiv:2104.14294, App. F.2).

    One classifier for each learning rate is trained, all on the same features:
    momentum 0.9, no weight decay, a cosine to 0 by epochs. The problem is convex, so
    each starts from zero. The score is that of the best learning rate on the
    validation pictures, as is usual for this protocol.

    Attributes:
        epochs: passes over the training pictures.
        batch_size: pictures of a step over all ranks; a last smaller one is left out.
        lrs: learning rates per 256 pictures of a step, the linear rule.
        augment: random resized crops (8 % to all of the picture) and flips in
            training, so that each epoch needs a forward pass of every picture. False
            takes the central crops, whose features are made once: much faster, and a
            lower score.
        seed: of the order, crops and flips.
        resize: px of the shorter side before the central crop.
        crop: side of the crops in px.
        train_list: file that names the training pictures to use; None: all.
        num_workers: processes that read pictures, on each rank.

    Raises:
        DenseSSLError: a number is out of range.
    """

    epochs: int = 100
    batch_size: int = 1024
    lrs: Sequence[float] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    augment: bool = True
    seed: int = 0
    resize: int = 256
    crop: int = 224
    train_list: str | None = None
    num_workers: int = 4

    distributed = True

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1:
            raise DenseSSLError(
                f'LinearClassification: epochs={self.epochs}, batch_size='
                f'{self.batch_size}; give 1 or more'
            )
        if not self.lrs or min(self.lrs) <= 0:
            raise DenseSSLError(
                f'LinearClassification: lrs={list(self.lrs)}; give numbers above 0'
            )

    def run(self, extractor: FeatureExtractor, data: Path, out: Path) -> Scores:
        """Train on ``data/train/CLASS``, score on ``data/val/CLASS``.

        Raises:
            DenseSSLError: folders or classes are missing, or there are fewer training
                pictures than ranks.
        """
        train = read_split(data, 'train', list_file=self.train_list)
        val = read_split(data, 'val', train.classes)
        world = get_dist_info()[1]
        if len(train.paths) < world or self.batch_size < world:
            raise DenseSSLError(
                f'LinearClassification: {len(train.paths)} training pictures in '
                f'batches of {self.batch_size} on {world} ranks; start fewer'
            )
        features = self._features(extractor, val, 'val')
        cached = None if self.augment else self._features(extractor, train, 'train')
        batch_size = min(self.batch_size, len(train.paths))
        heads = LinearHeads(
            [lr * batch_size / 256 for lr in self.lrs],
            features.shape[1],
            len(train.classes),
            extractor.device,
        )
        titles = (f'epoch {i + 1}/{self.epochs}' for i in range(self.epochs))
        for epoch, title in enumerate(titles):
            heads.set_share(0.5 * (1 + math.cos(math.pi * epoch / self.epochs)))
            batches = self._order(epoch, len(train.paths), batch_size)
            if cached is None:
                steps = self._augmented(extractor, train, epoch, batches, title)
            else:
                steps = ((cached[batch], train.labels[batch]) for batch in batches)
            for inputs, labels in steps:
                heads.step(inputs, labels, batch_size, shared=cached is None)
        return self._scores(heads.accuracies(features, val.labels), train, val)

    def _scores(
        self, accuracies: Tensor, train: LabelledImages, val: LabelledImages
    ) -> Scores:
        best = int(accuracies[:, 0].argmax())
        names = ('top1', 'top5') if len(train.classes) > 5 else ('top1',)
        metrics = dict(zip(names, accuracies[best].tolist(), strict=False))
        metrics['best_lr'] = self.lrs[best]
        for lr, (top1, _) in zip(self.lrs, accuracies.tolist(), strict=True):
            metrics[f'top1_lr_{lr:g}'] = top1
        counts = dict(
            num_train=len(train.paths),
            num_val=len(val.paths),
            num_classes=len(train.classes),
        )
        return Scores(metrics, score_settings(self) | counts)

    def _features(
        self, extractor: FeatureExtractor, split: LabelledImages, title: str
    ) -> Tensor:
        crops = CentreCrops(split.paths, self.resize, self.crop)
        return pooled_features(extractor, crops, self.num_workers, title)

    def _order(self, epoch: int, total: int, batch_size: int) -> list[np.ndarray]:
        """Indices of every whole batch of an epoch, the same on all ranks."""
        order = np.random.default_rng((self.seed, epoch)).permutation(total)
        return list(order[: total - total % batch_size].reshape(-1, batch_size))

    def _augmented(
        self,
        extractor: FeatureExtractor,
        train: LabelledImages,
        epoch: int,
        batches: list[np.ndarray],
        title: str,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and labels of this rank's share of every batch."""
        rank, world = get_dist_info()
        crops = RandomCrops(train, self.crop, (self.seed, epoch))
        own = [batch[rank::world].tolist() for batch in batches]
        loader = DataLoader(crops, batch_sampler=own, num_workers=self.num_workers)
        for pictures, labels in progress(loader, len(own), title):
            yield extractor.pooled(pictures), labels


class RandomCrops(Dataset):
    """Random resized crops, flipped or not: a function of seed and index alone.

    Args:
        images: the pictures.
        crop: side of the crops in px.
        seed: numbers.
    """

    def __init__(
        self, images: LabelledImages, crop: int, seed: tuple[int, ...]
    ) -> None:
        self.images = images
        self.seed = seed
        colours_left = dict(jitter=0, grayscale=0)
        view = dict(role='view', size=crop, scale=(0.08, 1.0), **colours_left)
        self.cut = MultiCrop([view])

    def __len__(self) -> int:
        return len(self.images.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Uint8 ``(3, crop, crop)`` and its label."""
        rng = np.random.default_rng((*self.seed, index))
        picture = open_image(self.images.paths[index])
        views = self.cut(dict(img=picture, rng=rng))['inputs']['view']
        return views[0], self.images.labels[index]


class LinearHeads:
    """Softmax regressions with a learning rate each, trained side by side.

    Args:
        lrs: ``L`` learning rates at the start.
        dims: ``D`` of the features.
        num_classes: ``C``.
        device: where to compute.
    """

    def __init__(
        self,
        lrs: Sequence[float],
        dims: int,
        num_classes: int,
        device: torch.device | str = 'cpu',
    ) -> None:
        shape = (dims + 1, num_classes)  # the last row is the bias
        self.weights = [
            torch.zeros(shape, device=device, requires_grad=True) for _ in lrs
        ]
        self.lrs = lrs
        self.optimizer = torch.optim.SGD(
            [dict(params=[w], lr=lr) for w, lr in zip(self.weights, lrs, strict=True)],
            momentum=0.9,
        )

    def set_share(self, share: float) -> None:
        """Set every learning rate to a share of its start."""
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group['lr'] = share * lr

    def step(
        self, features: Tensor, labels: Tensor, batch_size: int, *, shared: bool
    ) -> None:
        """One SGD step on the mean cross-entropy of a batch.

        Args:
            features: ``(b, D)``, this rank's share of the batch.
            labels: ``(b,)``.
            batch_size: of the whole batch.
            shared: whether every rank has a share; else each has the whole batch.
        """
        labels = labels.to(self.weights[0].device)
        losses = [
            F.cross_entropy(logits, labels, reduction='sum') / batch_size
            for logits in self._logits(features)
        ]
        self.optimizer.zero_grad()
        sum(losses).backward()
        if shared:
            for weight in self.weights:
                all_reduce(weight.grad)
        self.optimizer.step()

    @torch.no_grad()
    def accuracies(self, features: Tensor, labels: Tensor) -> Tensor:
        """``(L, 2)`` float64 shares with the right class first, and in the first 5."""
        right = torch.zeros(len(self.weights), 2, dtype=torch.float64)
        for part, target in zip(features.split(4096), labels.split(4096), strict=True):
            for i, logits in enumerate(self._logits(part)):
                if not logits.isfinite().all():  # diverged: no picture is right
                    continue
                top = logits.topk(min(5, logits.shape[1])).indices.cpu()
                hit = top == target[:, None]
                right[i] += torch.stack([hit[:, 0].sum(), hit.any(1).sum()])
        return right / len(labels)

    def _logits(self, features: Tensor) -> list[Tensor]:
        features = features.to(self.weights[0])
        return [features @ weight[:-1] + weight[-1] for weight in self.weights]
