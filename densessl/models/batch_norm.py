"""Batch norm over the batches of all processes, and the MLP that is built with it."""

from __future__ import annotations

import torch
from mmengine import dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from densessl.errors import DenseSSLError


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over ranks; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, 'sum')
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad, 'sum')
        return grad


class SyncBatchNorm(nn.BatchNorm1d):
    """torch's BatchNorm1d for ``(n, C)``, with the batch of all ranks in training.

    torch's own SyncBatchNorm refuses the CPU. Here ranks exchange ``2 C + 1`` numbers
    forward and as many backward: sums, sums of squares and the count. They are taken
    about the running mean, which all ranks share, so that their difference keeps its
    digits where the mean is far from 0.

    Gradients are those of the sum of all ranks' losses; averaged over ranks, as DDP
    does, they are one process's with the whole batch.

    Raises:
        DenseSSLError: a batch of one row in all, in training.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(n, C)``, normalised, scaled and shifted; of the type of ``x``."""
        if self.training and dist.get_world_size() > 1:
            return self.over_ranks(x)
        if self.training and len(x) == 1:
            raise DenseSSLError(
                'SyncBatchNorm: a batch of one row has no spread; raise batch_size to '
                '2 or more, or lower accumulate'
            )
        return super().forward(x)

    def over_ranks(self, x: Tensor) -> Tensor:
        """The forward pass in training, over any number of ranks."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            shifted = x.to(dtype) - self.running_mean
            count = shifted.new_tensor([len(x)])
            sums = torch.cat([shifted.sum(0), shifted.square().sum(0), count])
            sums = _SumOverRanks.apply(sums)
            count = sums[-1].detach()
            mean, square = (sums[:-1] / count).chunk(2)
            variance = (square - mean.square()).clamp_min(0)
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean += self.momentum * mean
                unbiased = variance * count / (count - 1)
                self.running_var.lerp_(unbiased, self.momentum)
            scale = self.weight * (variance + self.eps).rsqrt()
            return ((shifted - mean) * scale + self.bias).to(x.dtype)


class BatchNormMLP(nn.Sequential):
    """``in -> hidden -> batch norm -> ReLU -> out`` (MoBY, arXiv:2105.04553, Sec. 3).

    Args:
        in_dims: width of the input.
        hidden_dims: width of the hidden layer.
        out_dims: width of the output.
    """

    def __init__(self, in_dims: int, hidden_dims: int, out_dims: int) -> None:
        super().__init__(
            nn.Linear(in_dims, hidden_dims),
            SyncBatchNorm(hidden_dims),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dims, out_dims),
        )
