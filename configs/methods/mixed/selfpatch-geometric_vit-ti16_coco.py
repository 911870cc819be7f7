"""SelfPatch and regions matched by place, ViT-Ti/16, COCO train2017, 200 epochs.

Two dense tasks on the same tokens, of equal weight: the neighbours within a view, and
the same place in other views. Not yet run here.
"""

_base_ = ['../selfpatch_vit-ti16_coco.py']
model = dict(
    heads=dict(
        region=dict(
            type='RegionHead',
            matching='geometric',
            out_dims=4096,
            loss_weight=0.1,
            teacher_temp=0.04,
            projector=dict(norm_last_layer=True),
        )
    )
)
