"""About 100,000 pictures, 8 GPUs: SelfPatch, ViT-S/16, 78,000 steps of 8 x 64 images.

Not yet run here.
"""

_base_ = ['../methods/selfpatch_vit-s16.py']
train_dataloader = dict(
    batch_size=64,
    sampler=dict(length=200000),
    dataset=dict(data_root='data/pictures'),
)
model = dict(heads=dict(view=dict(out_dims=4096)))
default_hooks = dict(checkpoint=dict(interval=5))
