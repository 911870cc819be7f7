"""EsViT, Swin-S/7, ImageNet-1K, 300 epochs, 8 x 64 images.

Not yet run here.
"""

_base_ = ['esvit_swin-t-w7.py']
model = dict(backbone=dict(arch='small'))
