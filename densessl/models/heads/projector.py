"""DINO's projector: an MLP, a unit-length bottleneck, weight-normalised prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densessl.models.backbones.vision_transformer import init_linear
from densessl.models.mlp import gelu_linear


class DINOProjector(nn.Module):
    """``D -> hidden -> GELU -> hidden -> GELU -> bottleneck -> L2 -> K`` logits.

    The loss takes the two halves apart: ``embed`` gives the unit-length bottleneck and
    ``last_layer`` the prototypes, so that logits can be made in chunks (DINO,
    arXiv:2104.14294, App. C).

    Args:
        embed_dims: width ``D`` of the input.
        out_dims: prototypes ``K``.
        hidden_dims: width of the hidden layers.
        bottleneck_dims: width of the unit-length bottleneck.
        norm_last_layer: keep the last layer's scale ``g`` at 1 instead of training it.
    """

    def __init__(
        self,
        embed_dims: int,
        out_dims: int,
        *,
        hidden_dims: int = 2048,
        bottleneck_dims: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dims, hidden_dims),
            nn.GELU(),
            nn.Linear(hidden_dims, hidden_dims),
            nn.GELU(),
            nn.Linear(hidden_dims, bottleneck_dims),
        )
        self.last_layer = PrototypeLayer(bottleneck_dims, out_dims, norm_last_layer)
        self.mlp.apply(init_linear)

    def embed(self, x: Tensor) -> Tensor:
        """Unit-length bottleneck of ``(..., D)``, float32 or wider."""
        first, _, second, _, last = self.mlp  # keys of an nn.Sequential
        x = gelu_linear(gelu_linear(first(x), second), last)
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(..., K)``."""
        return self.last_layer(self.embed(x))


class PrototypeLayer(nn.Module):
    """A weight-normalised linear layer without bias: ``W = g v / |v|``, row by row.

    ``W`` itself is never made: at K = 65536 it is 64 MiB a branch and head. Lengths go
    onto the logits instead.

    Args:
        in_dims: width of the input.
        out_dims: prototypes ``K``.
        unit_norm: fix ``g`` at 1.
    """

    def __init__(self, in_dims: int, out_dims: int, unit_norm: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(out_dims, in_dims))
        self.weight_g = nn.Parameter(torch.ones(out_dims, 1), not unit_norm)
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)  # torch's own for a Linear

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(..., K)``."""
        scale = self.weight_g / self.weight_v.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return F.linear(x, self.weight_v) * scale.squeeze(1)
