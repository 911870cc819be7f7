"""SelfPatch, ViT-Ti/16, ImageNet-10, 8 x 32 images: the study of patch size and k.

The pages of the paper that were at hand do not give this study's schedule, so the COCO
schedule stands here: 200 epochs, 2 x 224 + 2 x 96 views, K = 4096. Not yet run here.
"""

_base_ = ['selfpatch_vit-ti16_coco.py']
train_dataloader = dict(dataset=dict(data_root='data/imagenet10/train'))
