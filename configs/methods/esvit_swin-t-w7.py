"""EsViT (arXiv:2106.09785), Swin-T/7, ImageNet-1K, 300 epochs, 8 x 64 images.

View and region task from the first epoch. Not yet run here.
"""

_base_ = [
    '../_base_/runtime.py',
    '../_base_/data/imagenet_dino.py',
    '../_base_/models/esvit_swin.py',
]
train_cfg = dict(max_epochs=300)
