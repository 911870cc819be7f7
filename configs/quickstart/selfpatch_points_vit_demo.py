"""SelfPatch with reference points beside it, on built-in scenes, on a CPU."""

_base_ = ['selfpatch_vit-t8_demo.py']
model = dict(
    heads=dict(
        points=dict(
            type='PointHead',
            points=4,
            out_dims=256,
            teacher_temp=0.02,
            center_momentum=0.8,
            projector=dict(hidden_dims=256, bottleneck_dims=64),
        )
    )
)
