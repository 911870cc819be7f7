"""LOCA, ViT-B/16, ImageNet-1K, 100 epochs: the base of the analyses. Not yet run here."""

_base_ = ['loca_vit-b16.py']
train_cfg = dict(max_epochs=100)
