"""GELU and the linear layer behind it, without keeping the GELU's output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _GeluLinear(torch.autograd.Function):
    """``linear(gelu(x))``; the GELU is taken again in the backward pass.

    It costs a pass over ``x`` and saves a tensor of the hidden width, a quarter of what
    a transformer block keeps for its backward pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = F.linear(F.gelu(x), weight, bias)
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_weight = rows.T @ F.gelu(x).flatten(0, -2).to(rows.dtype)
        hidden = (grad @ weight.to(grad.dtype)).to(x.dtype)
        torch.ops.aten.gelu_backward.grad_input(hidden, x, grad_input=hidden)
        return hidden, grad_weight.to(weight.dtype), rows.sum(0).to(weight.dtype)


def gelu_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(gelu(x))``, exact GELU; also under autocast."""
    return _GeluLinear.apply(x, layer.weight, layer.bias)


class LeanMlp(Mlp):
    """timm's MLP for exact GELU and no dropout, with less kept for backward."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        return gelu_linear(self.fc1(x), self.fc2)


class LeanLayers(nn.Sequential):
    """The same for the layers of MMCV's FFN, ``[[linear, GELU, _], linear, _]``.

    Its state has the keys of the layers it is made of.
    """

    def forward(self, x: Tensor) -> Tensor:
        """See MMCV; dropout must be 0."""
        return gelu_linear(self[0][0](x), self[1])
