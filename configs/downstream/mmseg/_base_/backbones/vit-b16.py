"""ViT-B/16: 768 channels, 12 heads; else as vit-ti16.py."""

_base_ = ['vit-ti16.py']
backbone = dict(embed_dims=768, num_heads=12)
channels = [768] * 4
pyramid = [dict(_base_.pyramid[0], embed_dims=768)]
