"""From uint8 views to normalised floats on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from densessl.registry import MODELS


@MODELS.register_module()
class ViewPreprocessor(BaseDataPreprocessor):
    """Moves the views of a batch as bytes, one tensor a role, and normalises them.

    Args:
        mean: per channel, in 0..255.
        std: per channel, in 0..255.
    """

    def __init__(
        self,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__(non_blocking=True)
        shape = (1, 1, len(mean), 1, 1)
        self.register_buffer('mean', torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer('std', torch.tensor(std).view(shape), persistent=False)

    @property
    def normalization(self) -> dict[str, list[float]]:
        """``dict(mean, std)``, lists per channel in 0..255."""
        return {
            name: getattr(self, name).flatten().tolist() for name in ('mean', 'std')
        }

    def forward(self, data: dict, training: bool = False) -> dict:
        """Normalise ``data['inputs']``, ``{role: (B, v, C, H, W) uint8}``.

        Returns:
            ``dict(inputs={role: (v, B, C, H, W) float}, geometry=...)``, on the device.
        """
        inputs = {role: self._normalize(x) for role, x in data['inputs'].items()}
        geometry = data.get('geometry')
        return dict(
            inputs=inputs,
            geometry=None if geometry is None else geometry.to(self.device),
        )

    def _normalize(self, views: Tensor) -> Tensor:
        views = views.to(self.device, non_blocking=True).transpose(0, 1)
        return ((views - self.mean) / self.std).contiguous()
