"""Swin-S: 18 blocks in the third stage; else as swin-t.py."""

_base_ = ['swin-t.py']
backbone = dict(depths=(2, 2, 18, 2))
