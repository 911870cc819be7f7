"""Linear decoder on SUIM: 40,000 steps of 8 x 2 pictures."""

_base_ = ['../linear.py', '../data/suim.py', '../schedules/40k.py']
train_dataloader = dict(batch_size=2)
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    decode_head=dict(num_classes=_base_.num_classes),
    test_cfg=dict(crop_size=_base_.crop_size, stride=_base_.crop_size),
)
