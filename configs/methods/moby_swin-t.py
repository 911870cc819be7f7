"""MoBY, Swin-T/7, ImageNet-1K, 300 epochs, 8 x 64 images. Not yet run here."""

_base_ = ['moby_vit-s16.py']
model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        arch='tiny',
        window_size=7,
        drop_path_rate=0.2,
    ),
    neck=dict(type='AveragePoolNeck'),
)
