"""From views of 8 or 16 bits to normalised floats on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from densessl.datasets.transforms.on_device import augment_views
from densessl.errors import DenseSSLError
from densessl.registry import MODELS


@MODELS.register_module()
class ViewPreprocessor(BaseDataPreprocessor):
    """Moves the views of a batch as bytes, one tensor a role, and normalises them.

    Args:
        mean: per channel, in the pictures' own units: 0..255 for samples of 8 bits,
            0..65535 for 16.
        std: per channel, in the same units.

    Raises:
        DenseSSLError: mean and std are of other lengths, or a std is not positive.
    """

    def __init__(
        self,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__(non_blocking=True)
        if not len(mean) == len(std) > 0 or min(std) <= 0:
            raise DenseSSLError(
                f'ViewPreprocessor: mean={list(mean)}, std={list(std)}; give one '
                'number a channel in each, and std > 0'
            )
        self._wide = max(mean) > 255
        shape = (1, 1, len(mean), 1, 1)
        self.register_buffer('mean', torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer('std', torch.tensor(std).view(shape), persistent=False)

    @property
    def normalization(self) -> dict[str, list[float]]:
        """``dict(mean, std)``, lists per channel in the pictures' units."""
        return {
            name: getattr(self, name).flatten().tolist() for name in ('mean', 'std')
        }

    def forward(self, data: dict, training: bool = False) -> dict:
        """Normalise ``data['inputs']``, ``{role: (B, v, C, H, W)}``, uint8 or uint16.

        With ``data['changes']``, ``{role: (B, v, 11)}``, colours are changed first: see
        ``augment_on`` of :class:`~densessl.datasets.MultiCrop`.

        Returns:
            ``dict(inputs={role: (v, B, C, H, W) float}, geometry=...)``, on the device.

        Raises:
            DenseSSLError: mean and std are of other channels or of other units.
        """
        changes = data.get('changes', {})
        inputs = {
            role: self._normalize(x, changes.get(role))
            for role, x in data['inputs'].items()
        }
        geometry = data.get('geometry')
        if geometry is not None:
            geometry = geometry.to(self.device, non_blocking=True)
        return dict(inputs=inputs, geometry=geometry)

    def _normalize(self, views: Tensor, changes: Tensor | None) -> Tensor:
        self._check(views)
        views = views.to(self.device, non_blocking=True).transpose(0, 1)
        if views.dtype == torch.uint16:  # torch knows no arithmetic of these
            views = views.float()
        if changes is not None:
            views = views.float().contiguous()
            augment_views(views.flatten(0, 1), changes.transpose(0, 1).flatten(0, 1))
        return ((views - self.mean) / self.std).contiguous()

    def _check(self, views: Tensor) -> None:
        channels = self.mean.shape[2]
        remedy = 'give those of your pictures, see docs/channels.md'
        if views.shape[2] != channels:
            raise DenseSSLError(
                f'ViewPreprocessor: mean and std are of {channels} channels and the '
                f'pictures have {views.shape[2]}; {remedy}'
            )
        if views.dtype == torch.uint8 and self._wide:
            raise DenseSSLError(
                'ViewPreprocessor: a mean is above 255 and the pictures have 8 bits; '
                f'{remedy}'
            )
