"""GLSD (WACV 2023), Swin-T/7, ImageNet-1K, 300 epochs, 8 x 64 images.

The paper's three settings are one switch, ``model.heads.region.matching``:
``geometric`` (by place, the default), ``similarity`` (EsViT's), or ``None`` (vanilla:
the region head is left out). Not yet run here.
"""

_base_ = ['esvit_swin-t-w7.py']
model = dict(heads=dict(region=dict(matching='geometric')))
