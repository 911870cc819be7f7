"""EsViT on built-in scenes with a small Swin: under 4 minutes on 2 CPU cores."""

_base_ = ['glsd_swin_demo.py']
model = dict(heads=dict(region=dict(matching='similarity')))
