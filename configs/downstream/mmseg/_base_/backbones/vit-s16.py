"""ViT-S/16: 384 channels, 6 heads; else as vit-ti16.py."""

_base_ = ['vit-ti16.py']
backbone = dict(embed_dims=384, num_heads=6)
channels = [384] * 4
pyramid = [dict(_base_.pyramid[0], embed_dims=384)]
