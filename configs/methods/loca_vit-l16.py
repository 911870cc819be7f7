"""LOCA, ViT-L/16, ImageNet-1K, 600 epochs, 8 x 128 images. Not yet run here."""

_base_ = ['loca_vit-b16.py']
model = dict(backbone=dict(arch='large', pos_embed_std=1024**-0.5))
