"""Semantic FPN on ViT-Ti/16, ADE20K. Not yet run here."""

_base_ = ['_base_/semantic_fpn_ade20k.py', '_base_/backbones/vit-ti16.py']
_fpn = dict(type='FPN', in_channels=_base_.channels, out_channels=256, num_outs=4)
model = dict(backbone=_base_.backbone, neck=[*_base_.pyramid, _fpn])
