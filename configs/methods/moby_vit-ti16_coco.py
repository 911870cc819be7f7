"""MoBY, ViT-Ti/16, COCO train2017, 200 epochs, 8 x 32 images: SelfPatch's baseline.

Not yet run here.
"""

_base_ = [
    '../_base_/moby.py',
    '../_base_/data/coco_moby.py',
    '../_base_/models/moby_vit.py',
]
model = dict(backbone=dict(arch='tiny'))
train_cfg = dict(max_epochs=200)
