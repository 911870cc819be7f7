"""Linear decoder on Swin-B, BDD100K. Not yet run here."""

_base_ = ['_base_/linear/bdd100k.py', '_base_/backbones/swin-b.py']
_last = _base_.channels[-1]
model = dict(
    backbone=_base_.backbone, decode_head=dict(in_channels=_last, channels=_last)
)
