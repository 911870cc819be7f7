"""SelfPatch on MoBY, Swin-T/7, COCO train2017, 200 epochs, 8 x 32 images.

The patches are the last stage's 7 x 7 tokens. Not yet run here.
"""

_base_ = ['selfpatch-moby_vit-ti16_coco.py']
model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        arch='tiny',
        window_size=7,
        drop_path_rate=0.2,
    )
)
