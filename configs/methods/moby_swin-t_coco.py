"""MoBY, Swin-T/7, COCO train2017, 200 epochs, 8 x 32 images: SelfPatch's baseline.

Not yet run here.
"""

_base_ = ['moby_vit-ti16_coco.py']
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
