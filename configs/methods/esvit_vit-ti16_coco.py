"""EsViT, ViT-Ti/16, COCO train2017, 200 epochs, 8 x 32 images: SelfPatch's comparison.

The data, views and K = 4096 of SelfPatch's COCO study; the mean patch token is the
view's representation. Not yet run here.
"""

_base_ = [
    '../_base_/runtime.py',
    '../_base_/data/coco_selfpatch.py',
    '../_base_/models/esvit_swin.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='VisionTransformer',
        arch='tiny',
        patch_size=16,
        cls_token=False,
        drop_path_rate=0.1,
    ),
    heads=dict(view=dict(out_dims=4096), region=dict(out_dims=4096)),
)
train_cfg = dict(max_epochs=200)
