"""Linear decoder on CamVid: 20,000 steps of 8 x 2 pictures."""

_base_ = ['../linear.py', '../data/camvid.py', '../schedules/20k.py']
train_dataloader = dict(batch_size=2)
model = dict(
    data_preprocessor=dict(size=_base_.crop_size, seg_pad_val=_base_.ignore_index),
    decode_head=dict(num_classes=_base_.num_classes, ignore_index=_base_.ignore_index),
    test_cfg=dict(crop_size=_base_.crop_size, stride=_base_.crop_size),
)
