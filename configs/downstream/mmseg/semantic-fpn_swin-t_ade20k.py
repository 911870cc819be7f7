"""Semantic FPN on Swin-T, ADE20K. Not yet run here."""

_base_ = ['_base_/semantic_fpn_ade20k.py', '_base_/backbones/swin-t.py']
_fpn = dict(type='FPN', in_channels=_base_.channels, out_channels=256, num_outs=4)
model = dict(backbone=_base_.backbone, neck=[*_base_.pyramid, _fpn])
