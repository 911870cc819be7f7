"""About 100,000 pictures, one GPU: SelfPatch, ViT-Ti/16, 78,000 steps of 256 images.

The paper's COCO run (118,287 pictures) in one process. Not yet run here.
"""

_base_ = ['../methods/selfpatch_vit-ti16_coco.py']
train_dataloader = dict(
    batch_size=256,
    sampler=dict(length=100000),
    dataset=dict(data_root='data/pictures'),
)
default_hooks = dict(checkpoint=dict(interval=5))
