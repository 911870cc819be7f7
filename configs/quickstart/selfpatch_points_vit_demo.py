"""SelfPatch with reference points beside it, on built-in scenes, on a CPU."""

_base_ = ['selfpatch_vit-t8_demo.py']
_view = dict(role='global', size=64, scale=(0.4, 1.0), grayscale=1.0, blur=0.1)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(
                type='MultiCrop',
                views=[dict(count=2, **_view)],
                min_overlap=(0.02, 0.01),
            )
        ]
    )
)
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
