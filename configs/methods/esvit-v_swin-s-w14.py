"""EsViT's view task alone, Swin-S/14, ImageNet-1K, 300 epochs, 8 x 64 images.

Not yet run here.
"""

_base_ = ['esvit_swin-s-w14.py']
model = dict(heads=dict(region=dict(matching=None)))
