"""Swin-B: 128 channels in the first stage; else as swin-s.py."""

_base_ = ['swin-s.py']
backbone = dict(embed_dims=128, num_heads=(4, 8, 16, 32))
channels = [128, 256, 512, 1024]
