"""EsViT on built-in scenes with a small Swin: as long as GLSD's, 3 min 40 s."""

_base_ = ['glsd_swin_demo.py']
model = dict(heads=dict(region=dict(matching='similarity')))
