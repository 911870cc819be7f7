"""LayerNorm and GELU with the linear layer behind, their outputs not kept."""

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
        parts = _rows(x).split(_rows_at_once(x))
        parts = [F.linear(F.gelu(part), weight, bias) for part in parts]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = _rows(grad)
        lower, grad_weight = weight.to(rows.dtype), None
        hidden = x.new_empty(x.shape)
        some = _rows_at_once(x)
        parts = (_rows(t).split(some) for t in (x, hidden, grad))
        for part, of_part, upper in zip(*parts, strict=True):
            product = upper.T @ F.gelu(part).to(rows.dtype)
            product = product.to(weight.dtype)  # sums need its digits
            grad_weight = product if grad_weight is None else grad_weight.add_(product)
            product = (upper @ lower).to(x.dtype)
            torch.ops.aten.gelu_backward.grad_input(product, part, grad_input=of_part)
        return hidden, grad_weight, rows.sum(0, dtype=weight.dtype)


def _rows(x: Tensor) -> Tensor:
    """``(..., D)`` as ``(n, D)``."""
    return x.reshape(-1, x.shape[-1])


def _rows_at_once(x: Tensor) -> int:
    """Some on a CPU, all elsewhere."""
    if x.device.type != 'cpu':
        return max(1, x.numel() // x.shape[-1])
    return max(1, _CPU_HIDDEN // x.shape[-1])


def gelu_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(gelu(x))``, exact GELU; also under autocast.

    What is no linear layer (an adapter in its place, say) is called as it is.
    """
    if not isinstance(layer, nn.Linear):
        return layer(F.gelu(x))
    return _GeluLinear.apply(x, layer.weight, layer.bias)


class _NormLinear(torch.autograd.Function):
    """``linear(layer_norm(x))``; the norm is taken again in the backward pass."""

    @staticmethod
    def forward(ctx, x, scale, shift, eps: float, weight, bias) -> Tensor:
        ctx.save_for_backward(x, scale, shift, weight)
        ctx.eps = eps
        return F.linear(F.layer_norm(x, x.shape[-1:], scale, shift, eps), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, scale, shift, weight = ctx.saved_tensors
        full = x.to(torch.promote_types(x.dtype, scale.dtype))
        shape = x.shape[-1:]
        normed, mean, rstd = torch.native_layer_norm(full, shape, scale, shift, ctx.eps)
        rows = _rows(grad)
        grad_weight = rows.T @ _rows(normed).to(rows.dtype)
        of_normed = (grad @ weight.to(grad.dtype)).to(full.dtype)
        of_x, of_scale, of_shift = torch.ops.aten.native_layer_norm_backward(
            of_normed, full, shape, mean, rstd, scale, shift, [True] * 3
        )
        of_bias = rows.sum(0, dtype=weight.dtype)
        return (
            of_x.to(x.dtype),
            of_scale,
            of_shift,
            None,
            grad_weight.to(weight.dtype),
            of_bias,
        )


def norm_linear(x: Tensor, norm: nn.LayerNorm, layer: nn.Linear) -> Tensor:
    """``layer(norm(x))`` that keeps ``x`` alone for backward; also under autocast.

    What is no such layer (an adapter in its place, say) is called as it is.
    """
    if not (isinstance(layer, nn.Linear) and isinstance(norm, nn.LayerNorm)):
        return layer(norm(x))
    return _NormLinear.apply(
        x, norm.weight, norm.bias, norm.eps, layer.weight, layer.bias
    )


class LeanMlp(Mlp):
    """timm's MLP for exact GELU and no dropout, with less kept for backward."""

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """See timm; with ``norm``, of ``norm(x)``."""
        hidden = self.fc1(x) if norm is None else norm_linear(x, norm, self.fc1)
        return gelu_linear(hidden, self.fc2)


class LeanLayers(nn.Sequential):
    """The same for the layers of MMCV's FFN, ``[[linear, GELU, _], linear, _]``.

    Its state has the keys of the layers it is made of.
    """

    def forward(self, x: Tensor) -> Tensor:
        """See MMCV; dropout must be 0."""
        return gelu_linear(self[0][0](x), self[1])
