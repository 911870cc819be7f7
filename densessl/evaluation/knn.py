"""k nearest neighbours: which classes the most similar training pictures have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from densessl.errors import DenseSSLError
from densessl.registry import EVALUATORS

from .features import FeatureExtractor
from .labelled import CentreCrops, pooled_features, read_split
from .protocol import Scores, score_settings

_QUERIES, _BANK = 2**10, 2**14  # 64 MiB of similarities at once


@EVALUATORS.register_module()
@dataclass(frozen=True)
class KNN:
    """Weighted k-NN classification (arXiv:1805.01978, Sec. 3.4; k and crop of DINO).

    A validation picture gets the class ``argmax_c sum_i exp(cos_i / tau) [y_i = c]``
    over its ``k`` most similar training pictures.

    Attributes:
        ks: numbers of neighbours; the score of the first comes first.
        temperature: ``tau`` > 0, no unit.
        resize: px of the shorter side before the crop.
        crop: side of the central crop in px.
        train_list: file that names the training pictures to use; None: all.
        num_workers: processes that read pictures.

    Raises:
        DenseSSLError: a ``k`` below 1, or a temperature that is not positive.
    """

    ks: Sequence[int] = (20, 10, 100, 200)
    temperature: float = 0.07
    resize: int = 256
    crop: int = 224
    train_list: str | None = None
    num_workers: int = 4

    distributed = True

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise DenseSSLError(f'KNN: ks={list(self.ks)}; give numbers of 1 or more')
        if self.temperature <= 0:
            raise DenseSSLError(
                f'KNN: temperature={self.temperature}; give more than 0'
            )

    def run(self, extractor: FeatureExtractor, data: Path, out: Path) -> Scores:
        """Score on ``data/val/CLASS`` with neighbours from ``data/train/CLASS``.

        Raises:
            DenseSSLError: folders or classes are missing, or there are fewer training
                pictures than ``k``.
        """
        train = read_split(data, 'train', list_file=self.train_list)
        val = read_split(data, 'val', train.classes)
        _check_enough(max(self.ks), len(train.paths))
        bank, queries = (
            pooled_features(
                extractor,
                CentreCrops(split.paths, self.resize, self.crop),
                self.num_workers,
                title,
            )
            for title, split in (('train', train), ('val', val))
        )
        predicted = knn_classify(
            queries,
            bank,
            train.labels,
            self.ks,
            self.temperature,
            device=extractor.device,
        )
        right = predicted == val.labels
        return Scores(
            {
                f'top1_{k}nn': share.item()
                for k, share in zip(self.ks, right.double().mean(1), strict=True)
            },
            score_settings(self)
            | dict(
                num_train=len(train.paths),
                num_val=len(val.paths),
                num_classes=len(train.classes),
                feature_dims=bank.shape[1],
            ),
        )


def knn_classify(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    *,
    device: torch.device | str = 'cpu',
) -> Tensor:
    """Classes by the weighted votes of the nearest neighbours; see `KNN`.

    Exact. Memory beside the arguments: the ``max(ks)`` best of every query, and
    similarities in chunks of 1024 queries by 16384 neighbours.

    Args:
        queries: ``(Q, D)``, of any length.
        bank: ``(M, D)``, of any length.
        labels: ``(M,)`` classes from 0.
        ks: numbers of neighbours, at most ``M``.
        temperature: ``tau`` > 0.
        device: where to compute.

    Returns:
        ``(len(ks), Q)`` int64 classes on the CPU.

    Raises:
        DenseSSLError: ``M`` is less than a ``k``.
    """
    most = max(ks)
    _check_enough(most, len(bank))
    similarity, neighbour = nearest(queries, bank, most, device=device)
    votes = (similarity / temperature).exp()
    voted = labels[neighbour]
    num_classes = int(labels.max()) + 1
    predicted = []
    for k in ks:
        parts = [
            votes.new_zeros(len(vote), num_classes).scatter_add_(1, label, vote)
            for vote, label in zip(
                votes[:, :k].split(_QUERIES), voted[:, :k].split(_QUERIES), strict=True
            )
        ]
        predicted.append(torch.cat([part.argmax(1) for part in parts]))
    return torch.stack(predicted)


def nearest(
    queries: Tensor, bank: Tensor, k: int, *, device: torch.device | str = 'cpu'
) -> tuple[Tensor, Tensor]:
    """Cosines and indices of the ``k`` most similar rows of a bank.

    Args:
        queries: ``(Q, D)``.
        bank: ``(M, D)``, ``M >= k``.
        k: how many.
        device: where to compute.

    Returns:
        ``(Q, k)`` float64 cosines, falling, and ``(Q, k)`` int64 indices; on the CPU.
    """
    chunks = [
        F.normalize(chunk.to(device).float(), dim=1)
        for chunk in queries.split(_QUERIES)
    ]
    best = [(chunk.new_empty(len(chunk), 0), None) for chunk in chunks]
    start = 0
    for part in bank.split(_BANK):
        part = F.normalize(part.to(device).float(), dim=1)
        for i, chunk in enumerate(chunks):
            cosine, index = (chunk @ part.mT).topk(min(k, len(part)))
            index += start
            if start:
                cosine = torch.cat([best[i][0], cosine], 1)
                index = torch.cat([best[i][1], index], 1)
                cosine, kept = cosine.topk(min(k, cosine.shape[1]))
                index = index.gather(1, kept)
            best[i] = cosine, index
        start += len(part)
    return (
        torch.cat([cosine for cosine, _ in best]).double().cpu(),
        torch.cat([index for _, index in best]).cpu(),
    )


def _check_enough(k: int, found: int) -> None:
    if k > found:
        raise DenseSSLError(
            f'KNN: k={k} of {found} training pictures; give smaller ks, such as '
            f'--cfg-options protocol.ks=[{min(found, 20)}]'
        )
