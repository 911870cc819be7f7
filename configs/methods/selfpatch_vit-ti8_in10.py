"""SelfPatch, ViT-Ti/8, ImageNet-10, 8 x 32 images: the study of patch size and k.

The pages of the paper that were at hand do not give this study's schedule, so the COCO
schedule stands here, as in selfpatch_vit-ti16_in10.py. Not yet run here.
"""

_base_ = ['selfpatch_vit-ti16_in10.py']
model = dict(backbone=dict(patch_size=8))
