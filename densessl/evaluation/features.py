"""One door to a frozen backbone: bytes in, float32 tokens out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from densessl.datasets.channels import read_channels
from densessl.datasets.image_io import read_image
from densessl.errors import DenseSSLError
from densessl.models.features import Tokens

Sample = tuple[np.ndarray, np.ndarray]
"""A picture ``(H, W, C)``, mostly uint8 RGB, and its labels ``(H, W)``, integers."""

_PRECISIONS = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
_POOLS = ('auto', 'cls', 'mean', 'cls+mean')


class FeatureExtractor:
    """Tokens of a backbone that is left exactly as it was found.

    Images are normalised as in training and go through the backbone in small batches,
    in evaluation mode and without gradients. Afterwards every module is back in the
    mode it had, so a training loop may call this between two steps.

    Args:
        backbone: maps ``(B, C, H, W)`` normalised images to `Tokens` and has
            ``patch_size``, the distance of its tokens in pixels.
        mean: of the ``C`` channels, as in the data preprocessor: in units of 0..255, or
            0..65535 for samples of 16 bits.
        std: standard deviations in the same units.
        device: where to compute; the backbone is moved there. None leaves it where
            it is.
        precision: ``'fp32'``, even inside somebody else's autocast, or ``'bf16'`` or
            ``'fp16'`` autocast. Tokens are float32 in every case.
        batch_size: images in one forward pass.
        layers: how many of the last blocks give the tokens, side by side along the
            channels, the last block at the end. More than 1 needs a backbone with
            ``forward_layers``: a ViT, or a Swin, whose blocks of several stages go
            together where they are `pooled`.
        norm: whether these tokens went through the backbone's final norm, in a Swin
            those of the last stage.
        pool: what `pooled` makes of the tokens, of each layer: the class token
            (``'cls'``), the mean over patches (``'mean'``), both side by side
            (``'cls+mean'``), or the class token where there is one and else the mean
            (``'auto'``).

    Raises:
        DenseSSLError: unknown precision or pool, mean and std not in units of 0..255
            and more, or layers that the backbone cannot give.
    """

    def __init__(
        self,
        backbone: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str | None = None,
        precision: Literal['fp32', 'bf16', 'fp16'] = 'fp32',
        *,
        batch_size: int = 32,
        layers: int = 1,
        norm: bool = True,
        pool: Literal['auto', 'cls', 'mean', 'cls+mean'] = 'auto',
    ) -> None:
        if precision not in _PRECISIONS:
            raise DenseSSLError(
                f'FeatureExtractor: precision {precision!r} is unknown; '
                f'use one of {", ".join(_PRECISIONS)}'
            )
        if not len(mean) == len(std) > 0 or min(std) < 1:
            raise DenseSSLError(
                f'FeatureExtractor: mean {tuple(mean)} and std {tuple(std)} are not '
                'a value a channel each in units of 0..255; multiply fractions by 255'
            )
        if pool not in _POOLS:
            raise DenseSSLError(
                f'FeatureExtractor: pool {pool!r} is unknown; use one of '
                f'{", ".join(_POOLS)}'
            )
        last_only = not hasattr(backbone, 'forward_layers')
        if layers < 1 or (last_only and (layers > 1 or not norm)):
            raise DenseSSLError(
                f'FeatureExtractor: layers={layers}, norm={norm} of a '
                f'{type(backbone).__name__}; '
                + (
                    'it gives its last, normed layer only: set layers=1 and norm=True'
                    if last_only
                    else 'give 1 layer or more'
                )
            )
        self.backbone = backbone if device is None else backbone.to(device)
        self._normalization = [float(m) for m in mean], [float(s) for s in std]
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.precision = precision
        self.batch_size = batch_size
        self.layers = layers
        self.norm = norm
        self.pool = pool

    @property
    def takes_rgb(self) -> bool:
        """Whether it takes RGB pictures of 8 bits, judged by mean and std."""
        return len(self.mean) == 3 and float(self.mean.max()) <= 255

    def read(self, path: str | os.PathLike[str]) -> np.ndarray:
        """A picture ``(H, W, C)`` as the backbone takes it: RGB, or as it is stored.

        Raises:
            UnreadableImageError: the file is missing, or no picture.
            DenseSSLError: it has other channels or bits than the backbone takes.
        """
        if self.takes_rgb:
            return read_image(path)
        wide = float(self.mean.max()) > 255
        return read_channels(path, len(self.mean), 16 if wide else None)

    @property
    def settings(self) -> dict[str, Any]:
        """What features depend on beside the backbone, as plain values."""
        return dict(
            layers=self.layers,
            norm=self.norm,
            pool=self.pool,
            precision=self.precision,
            mean=self._normalization[0],
            std=self._normalization[1],
        )

    @property
    def device(self) -> torch.device:
        """Where the backbone's parameters are; the CPU if it has none."""
        parameter = next(self.backbone.parameters(), None)
        return torch.device('cpu') if parameter is None else parameter.device

    @torch.no_grad()
    def __call__(self, images: Tensor | np.ndarray) -> Tokens:
        """Tokens of a batch of pictures.

        Args:
            images: ``(B, H, W, C)`` or ``(B, C, H, W)`` uint8, or uint16 where the
                training had it; ``H`` and ``W`` are multiples of the backbone's
                ``patch_size``.

        Returns:
            Float32 tokens of the ``B`` images, on the backbone's device.

        Raises:
            DenseSSLError: another type, shape or size, or layers of several grids.
        """
        images = self._channels_first(torch.as_tensor(images))
        with _evaluating(self.backbone):
            parts = [
                self._side_by_side(self._forward(part))
                for part in images.split(self.batch_size)
            ]
        return Tokens(
            patches=torch.cat([part.patches for part in parts]).float(),
            grid=parts[0].grid,
            cls=None
            if parts[0].cls is None
            else torch.cat([part.cls for part in parts]).float(),
        )

    @torch.no_grad()
    def pooled(self, images: Tensor | np.ndarray) -> Tensor:
        """One vector a picture; see ``pool`` and ``layers``.

        Args:
            images: as for a call.

        Returns:
            ``(B, D')`` float32 on the backbone's device, ``D'`` the sum of the layers'
            widths, twice that for ``'cls+mean'``.

        Raises:
            DenseSSLError: as for a call, or ``'cls'`` of a backbone that has none.
        """
        images = self._channels_first(torch.as_tensor(images))
        with _evaluating(self.backbone):
            parts = images.split(self.batch_size)
            return torch.cat([self._pool(self._forward(part)) for part in parts])

    def _pool(self, layers: list[Tokens]) -> Tensor:
        kind, has_cls = self.pool, layers[0].cls is not None
        if kind == 'auto':
            kind = 'cls' if has_cls else 'mean'
        if kind != 'mean' and not has_cls:
            raise DenseSSLError(
                f'FeatureExtractor: pool={kind!r}, and a '
                f"{type(self.backbone).__name__} has no class token; use pool='mean'"
            )
        mean = [] if kind == 'cls' else [t.patches.float().mean(1) for t in layers]
        cls = [] if kind == 'mean' else [t.cls.float() for t in layers]
        return torch.cat([*cls, *mean], 1)

    def _side_by_side(self, layers: list[Tokens]) -> Tokens:
        """Layers of one grid as one, along the channels."""
        grids = [tokens.grid for tokens in layers]
        if len(set(grids)) > 1:
            found = ', '.join(f'{h} x {w}' for h, w in grids)
            raise DenseSSLError(
                f'FeatureExtractor: layers={self.layers} of a '
                f'{type(self.backbone).__name__} have grids of {found} tokens; give '
                f'layers={grids.count(grids[-1])} or fewer, those of the last stage'
            )
        return Tokens(
            patches=torch.cat([each.patches for each in layers], 2),
            grid=grids[0],
            cls=None
            if layers[0].cls is None
            else torch.cat([each.cls for each in layers], 1),
        )

    def _channels_first(self, images: Tensor) -> Tensor:
        shape, channels = tuple(images.shape), len(self.mean)
        types = {torch.uint16} if float(self.mean.max()) > 255 else {torch.uint8}
        if not self.takes_rgb:  # dark pictures of 16 bits may have a small mean
            types.add(torch.uint16)
        if images.dtype not in types or len(shape) != 4 or channels not in shape[1::2]:
            kind = 'uint8 RGB' if self.takes_rgb else 'what the training had,'
            raise DenseSSLError(
                f'FeatureExtractor: images are {images.dtype} {shape}; '
                f'give {kind} as (B, H, W, {channels}) or (B, {channels}, H, W)'
            )
        if shape[0] == 0:
            raise DenseSSLError('FeatureExtractor: no images; give at least one')
        if shape[3] == channels:
            images = images.permute(0, 3, 1, 2)
        height, width = images.shape[2:]
        patch = self.backbone.patch_size
        if height % patch or width % patch or not height or not width:
            raise DenseSSLError(
                f'FeatureExtractor: images of {height}x{width} px do not divide into '
                f'patches of {patch} px; resize them to multiples of {patch}'
            )
        return images

    def _forward(self, images: Tensor) -> list[Tokens]:
        """Tokens of each layer."""
        device = self.device
        images = images.to(device).float()
        images = (images - self.mean.to(device)) / self.std.to(device)
        dtype = _PRECISIONS[self.precision]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            if self.layers == 1 and self.norm:
                return [self.backbone(images)]
            last = range(-self.layers, 0)
            return self.backbone.forward_layers(images, last, norm=self.norm)


def labelled_batches(
    samples: Iterable[Sample], batch_size: int, name: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Stack labelled pictures of one size, in order.

    Args:
        samples: pictures and labels; read once.
        batch_size: samples in a batch; the last one may have fewer.
        name: what to call the set in an error.

    Yields:
        ``(B, H, W, 3)`` images and ``(B, H, W)`` labels, uint8 or int64.

    Raises:
        DenseSSLError: a mask has another size than its picture, a picture another
            size than the first, or there is none.
    """
    samples, index, size = iter(samples), 0, None
    while chunk := list(islice(samples, batch_size)):
        for image, mask in chunk:
            found = image.shape[:2]
            if mask.shape != found:
                raise DenseSSLError(
                    f'{name} sample {index}: the mask is {mask.shape} and its picture '
                    f'{found}; resize one to the other, the mask by nearest neighbour'
                )
            size = found if size is None else size
            if found != size:
                raise DenseSSLError(
                    f'{name} sample {index}: the picture is {found}, those before it '
                    f'{size}; resize all pictures and masks to one size'
                )
            index += 1
        masks = np.stack([mask for _, mask in chunk])
        if masks.dtype.kind in 'biu' and masks.dtype != np.uint8:
            masks = masks.astype(np.int64)  # torch knows few unsigned types
        images = np.stack([image for image, _ in chunk])
        yield torch.from_numpy(images), torch.from_numpy(masks)
    if not index:
        raise DenseSSLError(f'no {name} samples; give at least one picture with a mask')


def channel_moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of ``(M, N, D)``, in float64.

    A channel that is constant up to rounding gets deviation 1: it has nothing to say,
    and its rounding errors shall not be blown up.
    """
    total = patches.shape[0] * patches.shape[1]
    mean = var = torch.zeros(patches.shape[2], dtype=torch.float64)
    for part in patches.split(64):
        mean = mean + part.cpu().double().sum((0, 1)) / total
    for part in patches.split(64):
        var = var + (part.cpu().double() - mean).square().sum((0, 1)) / total
    std = var.sqrt()
    return mean, torch.where(std <= 1e-6 * mean.abs(), 1.0, std)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside, each submodule in the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
