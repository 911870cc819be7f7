"""LOCA, ViT-H/16, ImageNet-1K, 600 epochs, 8 x 128 images. Not yet run here."""

_base_ = ['loca_vit-b16.py']
model = dict(
    backbone=dict(arch='huge', pos_embed_std=1280**-0.5),
    heads=dict(position=dict(num_heads=16)),
)
