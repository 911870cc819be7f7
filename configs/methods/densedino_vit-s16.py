"""DenseDINO (IJCAI 2023), ViT-S/16, ImageNet-1K, 4 x 224, 300 epochs, 8 x 64 images.

Follows the authors' published command; see docs/methods/densedino.md. Not yet run here.
"""

_base_ = [
    '../_base_/runtime.py',
    '../_base_/data/imagenet_densedino.py',
    '../_base_/models/densedino_vit.py',
]
train_cfg = dict(max_epochs=300)
