"""About 1,000,000 pictures, one GPU: SelfPatch, ViT-S/16, 195,300 steps of 256 images.

Not yet run here.
"""

_base_ = ['../methods/selfpatch_vit-ti16_coco.py']
train_dataloader = dict(
    batch_size=256,
    sampler=dict(length=1000000),
    dataset=dict(data_root='data/pictures'),
)
model = dict(
    backbone=dict(arch='small'), heads=dict(view=dict(out_dims=65536)), accumulate=2
)
train_cfg = dict(max_epochs=50)
default_hooks = dict(schedule=dict(warmup_epochs=3))
