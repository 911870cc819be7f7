"""SelfPatch (CVPR 2022), ViT-S/16, ImageNet-1K, 200 epochs, 8 x 128 images.

Follows the authors' code where it differs from the paper; see
docs/methods/selfpatch.md. Not yet run here.
"""

_base_ = [
    '../_base_/runtime.py',
    '../_base_/data/imagenet_selfpatch.py',
    '../_base_/models/selfpatch_vit.py',
]
train_cfg = dict(max_epochs=200)
