"""Where a backbone goes: the packages it can be exported to."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import timm
from torch import nn

from densessl.errors import DenseSSLError
from densessl.models.backbones import SwinTransformer, TimmBackbone, VisionTransformer

from .base import Twin, largest_difference
from .resnet import resnet_twin, timm_twin
from .swin import swin_twin
from .vit import is_plain, vit_twin

__all__ = ['TARGETS', 'Twin', 'distribution', 'installed', 'largest_difference', 'twin']

TARGETS = ('mmseg', 'mmdet', 'mmpretrain', 'timm', 'hf', 'torchvision-resnet')
_DISTRIBUTIONS = {
    'mmseg': 'mmsegmentation',
    'hf': 'transformers',
    'torchvision-resnet': 'torchvision',
}


def distribution(target: str) -> str:
    """Name of the package of a target, as pip knows it."""
    return _DISTRIBUTIONS.get(target, target)


def installed(target: str) -> str | None:
    """Version of the target's package, None where there is none."""
    try:
        return version(distribution(target))
    except PackageNotFoundError:
        return None


def twin(backbone: nn.Module, target: str) -> Twin:
    """What stands for a backbone in a target.

    Raises:
        DenseSSLError: the target has no such architecture.
    """
    found = _find(backbone, target)
    if found is None:
        network = backbone.model if isinstance(backbone, TimmBackbone) else backbone
        raise DenseSSLError(
            f'--to {target}: there is no {type(network).__name__} such as this one '
            f'there; {_alternatives(backbone)}'
        )
    return found


def _find(backbone: nn.Module, target: str) -> Twin | None:
    network = backbone.model if isinstance(backbone, TimmBackbone) else backbone
    if isinstance(network, timm.models.ResNet):
        return resnet_twin(backbone, target)
    if isinstance(network, timm.models.SwinTransformer | SwinTransformer):
        return swin_twin(backbone, target)
    plain_timm = type(network) is timm.models.VisionTransformer and is_plain(network)
    if isinstance(network, VisionTransformer) or plain_timm:
        return vit_twin(network, target)
    if isinstance(backbone, TimmBackbone) and target == 'timm':
        return timm_twin(backbone)
    return None


def _alternatives(backbone: nn.Module) -> str:
    fitting = []
    for target in TARGETS:
        try:
            if _find(backbone, target) is not None:
                fitting.append(target)
        except DenseSSLError:
            continue
    if not fitting:
        return 'use it through densessl.load_backbone'
    return f'choose from {", ".join(fitting)}'
