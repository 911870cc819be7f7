"""Depth of each pixel from frozen tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.models.features import Tokens
from densessl.registry import EVALUATORS

from .depth_heads import depth_head
from .features import FeatureExtractor
from .linear_segmentation import resize_bilinear
from .mask_pictures import evenly, save_picture
from .progress import progress
from .protocol import Scores
from .segmentation_folder import LabelledFolder, paired, read_plane
from .segmentation_protocol import extracted, pair_of
from .training_features import Cache, TrainingFeatures, training_features

THRESHOLDS = (1.1, 1.25, 1.25**2)
_NAMES = ('mse_m2', 'abs_rel', 'delta_1.1', 'delta_1.25', 'delta_1.25^2')
_LEAST_M = 1e-3  # predictions are at least this


@EVALUATORS.register_module()
@dataclass(frozen=True, kw_only=True)
class DepthEstimation:
    """Depth by a small head on frozen patch tokens.

    ``images/SPLIT`` has the pictures and ``depth/SPLIT`` a map of the same stem for
    each: a 16-bit PNG, or ``.npy`` in metres. A value of 0 says that the depth is not
    known; such pixels count neither in training nor in the scores. Both are resized to
    ``size``, depth maps by nearest neighbour.

    The head predicts ``log(1 + depth)``. Its output is resized bilinearly to
    ``train_size``, the loss is the squared error, the optimiser AdamW with a cosine
    schedule. Metrics, over all known pixels of the validation split at ``size``, are
    those of LOCA's Table 6: ``mse_m2``, ``abs_rel`` = mean of ``|p - t| / t``, and
    ``delta_X``, the share with ``max(p / t, t / p) < X``.

    Attributes:
        head: ``'linear'``, a 1x1 convolution, or ``'dpt'``, see `DPTDepthHead`; it
            takes several layers if the extractor gives them.
        units_per_m: value of a PNG at one metre: 256 for KITTI, 1000 for NYU and
            SUN-RGBD.
        size: side in px of the square pictures, or ``(H, W)``; multiples of the patch.
        train_split: the split that the head is trained on.
        val_split: the split that is scored.
        epochs: passes over the training pictures.
        batch_size: pictures in one step.
        lr: learning rate of the first step.
        weight_decay: AdamW's.
        train_size: side in px of the square depth maps in training.
        cache: where training features are; see `training_features`.
        num_pictures: how many pictures are drawn with their depth.
        seed: of the head's first weights and the order of the pictures.
    """

    head: Literal['linear', 'dpt'] = 'linear'
    units_per_m: float = 256.0
    size: int | Sequence[int] = 448
    train_split: str = 'train'
    val_split: str = 'val'
    epochs: int = 25
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 1e-4
    train_size: int = 112
    cache: Cache = 'fp32'
    num_pictures: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.head not in ('linear', 'dpt'):
            raise DenseSSLError(
                f'DepthEstimation: head {self.head!r} is unknown; use linear or dpt'
            )
        if not self.units_per_m > 0:
            raise DenseSSLError(
                f'DepthEstimation: units_per_m={self.units_per_m}; give the value of '
                'a PNG at one metre, such as 256'
            )

    def run(self, extractor: FeatureExtractor, data: Path, out: Path) -> Scores:
        """Train, score and draw; see `EvaluationProtocol`."""
        train, val = self.open(data, self.train_split), self.open(data, self.val_split)
        size = (self.train_size, self.train_size)
        features = training_features(extractor, train, size, self.cache)
        head = self.learn(features, extractor.device, extractor.layers)
        sums = torch.zeros(1 + len(_NAMES), dtype=torch.float64)
        pictures, first, chosen = [], 0, evenly(len(val), self.num_pictures)
        for images, maps, tokens in extracted(extractor, val):
            pred = head.predict(tokens, val.size).cpu()
            sums += error_sums(pred, maps)
            for i in sorted(chosen & set(range(first, first + len(maps)))):
                planes = [part[i - first].numpy() for part in (images, maps, pred)]
                path = out / 'depth' / f'{val.pairs[i][0].stem}.png'
                pictures.append(save_picture(path, depth_sheet(*planes)))
            first += len(maps)
        if not sums[0]:
            raise DenseSSLError(
                f'{data / "depth" / self.val_split}: no pixel has a depth, all are 0; '
                'give depth maps with known pixels'
            )
        metrics = dict(zip(_NAMES, (sums[1:] / sums[0]).tolist(), strict=True))
        about = dict(asdict(self), num_train=len(train), num_val=len(val))
        about.update(num_pixels=int(sums[0]))
        return Scores(metrics, about, pictures)

    def open(self, data: Path, split: str) -> LabelledFolder:
        """A split; its depth maps are read later."""
        folders = data / 'images' / split, data / 'depth' / split
        read = partial(read_depth, units_per_m=self.units_per_m)
        pairs = paired(*folders, ('png', 'npy'))
        return LabelledFolder(pairs, pair_of(self.size), read, f'features of {split}')

    @torch.enable_grad()
    def learn(
        self, features: TrainingFeatures, device: torch.device | str, layers: int = 1
    ) -> DepthReader:
        """Train a head on tokens and depth maps ``(M, s, s)`` in metres.

        Raises:
            DenseSSLError: no pixel of the maps has a depth.
        """
        depth, size = features.labels, tuple(features.labels.shape[1:])
        if not (depth > 0).any():
            raise DenseSSLError(
                'training depth: no pixel has a depth, all are 0; '
                'give depth maps with known pixels'
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            head = depth_head(self.head, len(features.shift), layers)
        offset = depth[depth > 0].log1p().mean()
        reader = DepthReader(head, features.shift, features.scale, offset).to(device)
        optimizer = torch.optim.AdamW(
            head.parameters(), lr=self.lr, weight_decay=self.weight_decay
        )
        steps = self.epochs * math.ceil(len(depth) / self.batch_size)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        rng = np.random.default_rng(self.seed)
        for _ in progress(range(self.epochs), self.epochs, 'epochs'):
            order = torch.from_numpy(rng.permutation(len(depth)))
            for chosen in order.split(self.batch_size):
                target = depth[chosen].to(device)
                tokens = features.patches(chosen).to(device, torch.float32)
                values = reader(tokens, features.grid, size)
                known = target > 0
                if known.any():
                    loss = F.mse_loss(values[known], target[known].log1p())
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                cosine.step()
        return reader.eval()


class DepthReader(nn.Module):
    """A head behind the standardisation of its tokens.

    Args:
        head: ``(B, D, h, w)`` to ``(B, 1, h', w')``.
        shift: ``(D,)`` mean of the training tokens.
        scale: ``(D,)`` their standard deviation.
        offset: added to the head's output, the mean of the training targets.
    """

    def __init__(
        self, head: nn.Module, shift: Tensor, scale: Tensor, offset: Tensor
    ) -> None:
        super().__init__()
        self.head = head
        self.register_buffer('shift', shift.float())
        self.register_buffer('scale', scale.float())
        self.register_buffer('offset', offset.float())

    def forward(
        self, patches: Tensor, grid: tuple[int, int], size: tuple[int, int]
    ) -> Tensor:
        """``(B, N, D)`` tokens to ``(B, H, W)``, the logarithm of 1 + depth in m."""
        maps = ((patches - self.shift) / self.scale).mT.unflatten(2, grid)
        return self.offset + resize_bilinear(self.head(maps), size)[:, 0]

    @torch.no_grad()
    def predict(self, tokens: Tokens, size: tuple[int, int]) -> Tensor:
        """``(B, H, W)`` depth in m, 1 mm or more."""
        values = self(tokens.patches.to(self.shift), tokens.grid, size)
        return values.expm1().clamp_min(_LEAST_M)


def read_depth(path: Path, units_per_m: float) -> np.ndarray:
    """Depth ``(H, W)`` float32 in metres of a 16-bit PNG or an ``.npy``; 0: not known.

    Raises:
        DenseSSLError: the file cannot be read, or a value is negative or not finite.
    """
    if path.suffix.lower() == '.npy':
        try:
            depth = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DenseSSLError(
                f'{path}: not an array ({str(error)[:60]}); replace it'
            ) from None
        if depth.ndim != 2 or depth.dtype.kind not in 'fiu':
            raise DenseSSLError(
                f'{path}: {depth.dtype} {depth.shape}; give depth (H, W) in metres'
            )
        depth = depth.astype(np.float32)
    else:
        depth = read_plane(path).astype(np.float32) / np.float32(units_per_m)
    if not np.isfinite(depth).all() or depth.min() < 0:
        raise DenseSSLError(
            f'{path}: depth is negative or not finite; write 0 where it is not known'
        )
    return depth


def error_sums(pred: Tensor, true: Tensor) -> Tensor:
    """Sums over known pixels, which add up over pictures; means are the metrics.

    Args:
        pred: depth in m, greater than 0.
        true: depth in m, same shape; 0 is not known.

    Returns:
        ``(6,)`` float64: number of pixels, then sums of the squared error, of the
        relative error, and the numbers within `THRESHOLDS`.
    """
    known = true > 0
    pred, true = pred[known].double(), true[known].double()
    ratio = torch.maximum(pred / true, true / pred)
    errors = [(pred - true).square(), (pred - true).abs() / true]
    errors += [ratio < threshold for threshold in THRESHOLDS]
    return torch.stack(
        [known.sum().double(), *(each.double().sum() for each in errors)]
    )


def depth_sheet(image: np.ndarray, true: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Picture, true and predicted depth side by side, near dark and far bright.

    Both maps have the colours of the true one's range; pixels not known are black.
    """
    known = true > 0
    low, high = (true[known].min(), true[known].max()) if known.any() else (0, 1)
    panels = [image]
    for depth in (true, pred):
        share = np.clip((depth - low) / max(high - low, 1e-6), 0, 1)
        grey = (share * 255).round().astype(np.uint8)
        panels.append(cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)[..., ::-1])
    panels[1] = np.where(known[..., None], panels[1], 0).astype(np.uint8)
    return np.concatenate(panels, 1)
