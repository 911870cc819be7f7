"""SelfPatch, ViT-Ti/32, ImageNet-10, 8 x 32 images: the study of patch size and k.

Views of 224 and 96 pixels have 7 x 7 and 3 x 3 patches; on the 3 x 3 grid a patch has
the other 8 as neighbours. The pages of the paper that were at hand do not give this
study's schedule, so the COCO schedule stands here, as in selfpatch_vit-ti16_in10.py.
Not yet run here.
"""

_base_ = ['selfpatch_vit-ti16_in10.py']
model = dict(backbone=dict(patch_size=32))
