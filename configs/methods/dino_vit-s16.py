"""DINO (arXiv:2104.14294), ViT-S/16, ImageNet-1K, 100 epochs, 8 x 64 images.

The authors report 69.3 k-NN and 74.0 linear. Not yet run here.
"""

_base_ = [
    '../_base_/runtime.py',
    '../_base_/data/imagenet_dino.py',
    '../_base_/models/dino_vit.py',
]
