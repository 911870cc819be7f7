"""Linear decoder on Swin-S, ISPRS Potsdam. Not yet run here."""

_base_ = ['_base_/linear/potsdam.py', '_base_/backbones/swin-s.py']
_last = _base_.channels[-1]
model = dict(
    backbone=_base_.backbone, decode_head=dict(in_channels=_last, channels=_last)
)
