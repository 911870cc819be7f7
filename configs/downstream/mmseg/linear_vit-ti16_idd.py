"""Linear decoder on ViT-Ti/16, IDD. Not yet run here."""

_base_ = ['_base_/linear/idd.py', '_base_/backbones/vit-ti16.py']
_last = _base_.channels[-1]
model = dict(
    backbone=_base_.backbone, decode_head=dict(in_channels=_last, channels=_last)
)
