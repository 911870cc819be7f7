"""LOCA, ViT-S/16, ImageNet-1K, 600 epochs, 8 x 128 images. Not yet run here."""

_base_ = ['loca_vit-b16.py']
model = dict(backbone=dict(arch='small', pos_embed_std=384**-0.5))
