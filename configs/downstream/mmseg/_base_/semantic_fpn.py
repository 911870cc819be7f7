"""Semantic FPN: four maps of 256 channels, 128 each, added up."""

_base_ = ['segmentor.py']
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
