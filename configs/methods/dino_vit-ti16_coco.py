"""DINO, ViT-Ti/16, COCO train2017, 200 epochs, 8 x 32 images: SelfPatch's baseline.

2 x 224 + 2 x 96 and K = 4096, as in the SelfPatch paper. Not yet run here.
"""

_base_ = [
    '../_base_/runtime.py',
    '../_base_/data/coco_selfpatch.py',
    '../_base_/models/dino_vit.py',
]
model = dict(backbone=dict(arch='tiny'), heads=dict(view=dict(out_dims=4096)))
train_cfg = dict(max_epochs=200)
