"""MoBY (arXiv:2105.04553), ViT-S/16, ImageNet-1K, 300 epochs, 8 x 64 images.

Follows the authors' code where it differs from the paper; see docs/methods/moby.md.
Not yet run here.
"""

_base_ = [
    '../_base_/moby.py',
    '../_base_/data/imagenet_moby.py',
    '../_base_/models/moby_vit.py',
]
