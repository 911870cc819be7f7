"""ResNets in other packages, and any timm model in timm itself."""

from __future__ import annotations

import timm
from torch import Tensor, nn

from densessl.interop import layouts
from densessl.interop.keymap import KeyMap, Rule
from densessl.models.backbones import TimmBackbone

from .base import Twin, arguments, input_size, last_map

_RESNETS = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152')


def timm_twin(backbone: TimmBackbone) -> Twin:
    """Any timm model, which is itself once its prefix is gone."""
    name, options = backbone.name, dict(backbone.options, num_classes=0)
    return Twin(
        keymap=KeyMap('timm', Rule('{rest*}', '{rest*}')),
        state=backbone.model.state_dict(),
        config=dict(model_name=name, **options),
        build=lambda: timm.create_model(name, **options),
        features=lambda module, x: module.forward_features(x),
        size=input_size(backbone),
        reference=backbone.model.forward_features,
    )


def resnet_twin(backbone: TimmBackbone, target: str) -> Twin | None:
    """A ResNet of timm in a target, None where the target has none such."""
    name = backbone.name.split('.')[0]
    if target == 'timm':
        return timm_twin(backbone)
    if name not in _RESNETS or target == 'hf':
        return None
    if target == 'torchvision-resnet':
        config, build, features = _resnet_torchvision(name)
    else:
        config, build, features = _resnet_openmmlab(name, target)
    return Twin(
        layouts.RESNET,
        backbone.state_dict(),
        config,
        build,
        features,
        224,
        ignore=('fc.',),
    )


def _resnet_torchvision(name: str):
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)()

    def features(module: nn.Module, x: Tensor) -> Tensor:
        body = nn.Sequential(*list(module.children())[:-2])
        return body(x).flatten(2).mT

    return dict(model=f'torchvision.models.{name}'), build, features


def _resnet_openmmlab(name: str, target: str):
    config = dict(type=f'{target}.ResNet', depth=int(name[6:]), style='pytorch')

    def build() -> nn.Module:
        if target == 'mmpretrain':
            from mmpretrain.models import ResNet
        elif target == 'mmseg':
            from mmseg.models.backbones import ResNet
        else:
            from mmdet.models.backbones import ResNet
        return ResNet(**arguments(config))

    return config, build, last_map
