"""UPerNet on ViT-Ti/16, ADE20K. Not yet run here."""

_base_ = ['_base_/upernet_ade20k.py', '_base_/backbones/vit-ti16.py']
model = dict(
    backbone=_base_.backbone,
    neck=_base_.pyramid,
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.channels[2]),
)
