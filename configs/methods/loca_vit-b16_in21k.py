"""LOCA, ViT-B/16, ImageNet-21K, 8 x 128 images. Not yet run here.

54 epochs of 14 million pictures: about the steps of 600 epochs of ImageNet-1K. The
authors' number is not at hand.
"""

_base_ = ['loca_vit-b16.py']
train_dataloader = dict(dataset=dict(data_root='data/imagenet21k'))
train_cfg = dict(max_epochs=54)
default_hooks = dict(schedule=dict(warmup_epochs=1.35))  # 15 of ImageNet-1K's
