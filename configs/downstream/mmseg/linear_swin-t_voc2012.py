"""Linear decoder on Swin-T, VOC 2012. Not yet run here."""

_base_ = ['_base_/linear/voc2012.py', '_base_/backbones/swin-t.py']
_last = _base_.channels[-1]
model = dict(
    backbone=_base_.backbone, decode_head=dict(in_channels=_last, channels=_last)
)
