"""GLSD, Swin-S/7, ImageNet-1K, 300 epochs, 8 x 64 images.

The switch of ``glsd_swin-t-w7.py``. Not yet run here.
"""

_base_ = ['esvit_swin-s-w7.py']
model = dict(heads=dict(region=dict(matching='geometric')))
