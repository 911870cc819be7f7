"""DINO, reference points and regions matched by place, ViT-Ti/16, ImageNet-1K.

DenseDINO's run (6 x 224, 100 epochs) with a third task: points are represented by
tokens of their own, regions by the patches. Not yet run here.
"""

_base_ = ['../densedino_vit-ti16.py']
model = dict(
    heads=dict(
        region=dict(
            type='RegionHead',
            matching='geometric',
            out_dims=4096,
            loss_weight=0.5,
            teacher_temp=0.04,
            projector=dict(norm_last_layer=True),
        )
    )
)
