"""GLSD, Swin-T/14, ImageNet-1K, 300 epochs, 8 x 64 images.

The switch of ``glsd_swin-t-w7.py``. Not yet run here.
"""

_base_ = ['esvit_swin-t-w14.py']
model = dict(heads=dict(region=dict(matching='geometric')))
