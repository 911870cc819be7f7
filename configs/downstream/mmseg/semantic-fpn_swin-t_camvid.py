"""Semantic FPN on Swin-T, CamVid, one GPU: 20,000 steps of 8. Not yet run here."""

_base_ = [
    '_base_/semantic_fpn.py',
    '_base_/data/camvid.py',
    '_base_/schedules/20k.py',
    '_base_/backbones/swin-t.py',
]
train_dataloader = dict(batch_size=8)
_fpn = dict(type='FPN', in_channels=_base_.channels, out_channels=256, num_outs=4)
model = dict(
    data_preprocessor=dict(size=_base_.crop_size, seg_pad_val=_base_.ignore_index),
    backbone=_base_.backbone,
    neck=[*_base_.pyramid, _fpn],
    decode_head=dict(num_classes=_base_.num_classes, ignore_index=_base_.ignore_index),
)
