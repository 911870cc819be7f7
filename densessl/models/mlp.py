"""GELU and the linear layer behind it, without keeping the GELU's output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CPU_HIDDEN = 2**21  # values of the hidden width at a time on a CPU: 8 MiB in float32


class _GeluLinear(torch.autograd.Function):
    """``linear(gelu(x))``; the GELU is taken again in the backward pass.

    It costs a pass over ``x`` and saves a tensor of the hidden width, a quarter of what
    a transformer block keeps for its backward pass. On a CPU both passes take some rows
    after the other: what they write is still in the cache when they read it, and no
    memory is fetched anew for it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        parts = [F.linear(F.gelu(part), weight, bias) for part in _some_rows(x)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        lower, grad_weight = weight.to(rows.dtype), None
        hidden = torch.empty_like(x)
        for part, of_part, upper in zip(
            _some_rows(x),
            _some_rows(hidden),
            rows.split(_rows_at_once(x)),
            strict=True,
        ):
            product = upper.T @ F.gelu(part).to(rows.dtype)
            product = product.to(weight.dtype)  # sums need its digits
            grad_weight = product if grad_weight is None else grad_weight.add_(product)
            product = (upper @ lower).to(x.dtype)
            torch.ops.aten.gelu_backward.grad_input(product, part, grad_input=of_part)
        return hidden, grad_weight, rows.sum(0).to(weight.dtype)


def _some_rows(x: Tensor) -> tuple[Tensor, ...]:
    """Rows of ``(..., D)`` as ``(n, D)``, some at a time on a CPU, all elsewhere."""
    return x.flatten(0, -2).split(_rows_at_once(x))


def _rows_at_once(x: Tensor) -> int:
    if x.device.type != 'cpu':
        return max(1, x.numel() // x.shape[-1])
    return max(1, _CPU_HIDDEN // x.shape[-1])


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
