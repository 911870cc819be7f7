"""About 1,000,000 pictures, 8 GPUs: SelfPatch, ViT-S/16, 195,200 steps of 8 x 128 images.

The paper's ImageNet-1K run. Not yet run here.
"""

_base_ = ['../methods/selfpatch_vit-s16.py']
train_dataloader = dict(
    sampler=dict(length=1000000), dataset=dict(data_root='data/pictures')
)
