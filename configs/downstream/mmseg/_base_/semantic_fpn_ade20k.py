"""Semantic FPN on ADE20K: 40,000 steps of 8 x 4 pictures of 512 x 512 px."""

_base_ = ['segmentor.py', 'data/ade20k.py', 'schedules/40k.py']
train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(enable=False, base_batch_size=32)
model = dict(
    decode_head=dict(
        type='FPNHead',
        in_channels=[256] * 4,
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        norm_cfg=dict(type='SyncBN'),
    )
)
