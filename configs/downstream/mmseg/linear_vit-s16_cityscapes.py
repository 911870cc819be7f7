"""Linear decoder on ViT-S/16, Cityscapes. Not yet run here."""

_base_ = ['_base_/linear/cityscapes.py', '_base_/backbones/vit-s16.py']
_last = _base_.channels[-1]
model = dict(
    backbone=_base_.backbone, decode_head=dict(in_channels=_last, channels=_last)
)
