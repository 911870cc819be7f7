"""Optimiser: precision by device, the papers' clipping, groups and their rates."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
)

from .distributed import unwrap

Precision = Literal['auto', 'bf16', 'fp16', 'fp32']
_BLOCK = re.compile(r'(.*?\.)?blocks\.\d+\.')


def clip_each_(gradients: list[Tensor], max_norm: float) -> None:
    """Scale each gradient to a norm of at most ``max_norm``, each by its own norm.

    DINO's code clips so; the global norm plays no part.
    """
    if not gradients:
        return
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = (max_norm / (norms + 1e-6)).clamp_(max=1.0)
    torch._foreach_mul_(gradients, factors.unbind())


@OPTIM_WRAPPERS.register_module()
class MixedPrecisionOptimWrapper(OptimWrapper):
    """Autocast on GPUs and plain float32 on CPU, from one config.

    Args:
        optimizer: the optimiser.
        precision: ``'auto'`` takes bf16 on GPUs that have it, fp16 with loss scaling on
            other GPUs, and fp32 on CPU; or one of these by name.
        clip_grad: ``dict(type='each', max_norm=3.0)`` clips each parameter by its own
            norm (DINO's code), ``dict(type='norm', max_norm=1.0)`` by the global norm.
            None clips nothing.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        precision: Precision = 'auto',
        clip_grad: dict | None = None,
    ) -> None:
        clip_grad = dict(clip_grad) if clip_grad else None
        self.clip_each = None
        if clip_grad and clip_grad.get('type') == 'each':
            self.clip_each = float(clip_grad['max_norm'])
            clip_grad = None
        super().__init__(optimizer, clip_grad=clip_grad)
        self.base_param_settings = None  # MMEngine's pseudo-group, for its schedulers
        cuda = torch.cuda.is_available()
        if precision == 'auto':
            bf16 = cuda and torch.cuda.is_bf16_supported()
            precision = 'bf16' if bf16 else 'fp16' if cuda else 'fp32'
        if precision not in ('bf16', 'fp16', 'fp32') or (
            precision == 'fp16' and not cuda
        ):
            raise DenseSSLError(
                f'optim_wrapper: precision={precision!r} on '
                f'{"GPU" if cuda else "CPU"}; use auto, bf16 or fp32, or fp16 on a GPU'
            )
        self.precision = precision
        self.device_type = 'cuda' if cuda else 'cpu'
        self.scaler = torch.amp.GradScaler(
            self.device_type, enabled=precision == 'fp16'
        )

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast for the forward pass; losses leave it where they need float32."""
        dtype = torch.float16 if self.precision == 'fp16' else torch.bfloat16
        enabled = self.precision != 'fp32'
        with torch.autocast(self.device_type, dtype, enabled=enabled):
            yield

    def backward(self, loss: Tensor, **kwargs) -> None:
        """Backward of the loss, scaled for fp16."""
        self.scaler.scale(loss).backward(**kwargs)

    def step(self, **kwargs) -> None:
        """Unscale, clip and step; fp16 steps with infinite gradients are skipped."""
        self.scaler.unscale_(self.optimizer)
        if self.clip_each is not None:
            groups = self.optimizer.param_groups
            parameters = [p for group in groups for p in group['params']]
            clip_each_(
                [p.grad for p in parameters if p.grad is not None], self.clip_each
            )
        elif self.clip_grad_kwargs:
            self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()

    def state_dict(self) -> dict:
        """State of the optimiser and of the loss scaler."""
        return dict(
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict()
        )

    def load_state_dict(self, state_dict: dict) -> None:
        """Take what ``state_dict`` gave."""
        self.optimizer.load_state_dict(state_dict['optimizer'])
        if state_dict['scaler']:
            self.scaler.load_state_dict(state_dict['scaler'])


def lr_factors(backbone: nn.Module, decay: float) -> dict[str, float]:
    """Factor of the learning rate of each parameter of a backbone, by its depth.

    ``decay ** (L + 1 - d)``: of ``L`` blocks, the last one (d = L) has ``decay``, and
    what comes before the first (d = 0: patch embedding, class token, position table)
    ``decay ** (L + 1)``; 1 is left for what follows the backbone. What stands between
    or after blocks (downsampling, the final norm) goes with the one before it, as in
    timm. ELECTRA (arXiv:2003.10555) and BEiT (arXiv:2106.08254) fine-tune so.

    Args:
        backbone: its blocks are named ``blocks.<i>``, in any number of stages, and
            registered in the order of the forward.
        decay: above 0, at most 1.

    Raises:
        DenseSSLError: the decay is out of range, or there are no such blocks.
    """
    if not 0 < decay <= 1:
        raise DenseSSLError(
            f'optim_wrapper: layer_decay={decay} is the factor of the learning rate '
            'from a block to the one before it; give one above 0 and at most 1 '
            '(often 0.65 to 0.9)'
        )
    blocks: set[str] = set()
    depths = {}
    for name, _ in backbone.named_parameters():
        if match := _BLOCK.match(name):
            blocks.add(match[0])
        depths[name] = len(blocks)
    if not blocks:
        kind = type(getattr(backbone, 'model', backbone)).__name__
        raise DenseSSLError(
            f'optim_wrapper: layer_decay={decay} goes by blocks, and {kind} has no '
            "parameters named 'blocks.<i>'; leave layer_decay out"
        )
    return {name: decay ** (len(blocks) + 1 - depth) for name, depth in depths.items()}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TwoGroupConstructor:
    """Weight decay on weights only: never on biases and 1-D parameters.

    Two groups, so that the optimiser steps over all parameters at once; with
    ``layer_decay`` two for each block, see :func:`lr_factors`.

    Args:
        optim_wrapper_cfg: config of the wrapper with its ``optimizer``, and
            ``layer_decay``, the factor of the learning rate from a block to the one
            before it (1, for all alike, where it is left out).
        paramwise_cfg: not supported, None.

    Raises:
        DenseSSLError: ``paramwise_cfg``; a ``layer_decay`` that is no factor, or a
            backbone without blocks.
    """

    def __init__(
        self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None
    ) -> None:
        if paramwise_cfg is not None:
            raise DenseSSLError(
                'TwoGroupConstructor: paramwise_cfg is not read here; set '
                "optim_wrapper.constructor='DefaultOptimWrapperConstructor' to use it"
            )
        self.cfg = optim_wrapper_cfg

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """The wrapper with an optimiser over the trained parameters of a model."""
        cfg, model = dict(self.cfg), unwrap(model)
        factors: dict[str, float] = {}
        if (decay := cfg.pop('layer_decay', 1.0)) != 1:
            of_backbone = lr_factors(model.backbone, decay).items()
            factors = {f'backbone.{name}': factor for name, factor in of_backbone}
        found: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                flat = parameter.ndim <= 1 or name.endswith('.bias')
                kind = (-factors.get(name, 1.0), flat)
                found.setdefault(kind, []).append(parameter)
        kinds = sorted(found)  # first the whole rate, which is the one that is logged
        groups = [
            dict(params=found[kind], **(dict(weight_decay=0.0) if kind[1] else {}))
            for kind in kinds
        ]
        optimizer = OPTIMIZERS.build(
            dict(cfg.pop('optimizer')), default_args=dict(params=groups)
        )
        for group, (factor, _) in zip(optimizer.param_groups, kinds, strict=True):
            group['lr'] *= -factor
        cfg.setdefault('type', 'MixedPrecisionOptimWrapper')
        return OPTIM_WRAPPERS.build(cfg, default_args=dict(optimizer=optimizer))
