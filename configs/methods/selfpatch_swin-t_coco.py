"""SelfPatch, Swin-T/7, COCO train2017, 200 epochs, 8 x 32 images.

The patches are the last stage's tokens: 7 x 7 of a 224-pixel view, 3 x 3 of a
96-pixel view. Not yet run here.
"""

_base_ = ['selfpatch_vit-ti16_coco.py']
model = dict(
    backbone=dict(
        _delete_=True, type='SwinTransformer', arch='tiny', drop_path_rate=0.1
    )
)
