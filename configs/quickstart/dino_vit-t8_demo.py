"""DINO on built-in scenes with a small ViT/8: about 3 minutes on 2 CPU cores."""

_base_ = ['selfpatch_vit-t8_demo.py']
# The mean patch token is the view's representation: in a short run the class token
# teaches the patches little.
model = dict(
    backbone=dict(final_norm=True),
    neck=dict(_delete_=True, type='AveragePoolNeck'),
    heads=dict(
        _delete_=True,
        view=dict(
            type='ViewHead',
            out_dims=256,
            teacher_temp=0.01,
            center_momentum=0.8,
            projector=dict(hidden_dims=256, bottleneck_dims=64),
        ),
    ),
)
