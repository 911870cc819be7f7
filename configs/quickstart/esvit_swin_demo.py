"""EsViT on built-in scenes with a small Swin: about 3 minutes on 2 CPU cores."""

_base_ = ['glsd_swin_demo.py']
model = dict(heads=dict(region=dict(matching='similarity')))
