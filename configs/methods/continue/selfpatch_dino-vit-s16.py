"""SelfPatch's patch task (CVPR 2022) added to DINO, from DINO's public ViT-S/16.

The class token stays the view's representation, as the weights know it, so that the projectors
alone are new; the summary of a patch's positives is their mean. Not yet run here at this
size.
"""

_base_ = ['dino_vit-s16.py']
model = dict(
    heads=dict(
        selfpatch=dict(
            type='SelfPatchHead',
            out_dims=4096,
            top_k=4,
            window=3,
            border='clip',
            loss_weight=0.1,
            teacher_temp=0.04,
            projector=dict(norm_last_layer=True),
        )
    )
)
