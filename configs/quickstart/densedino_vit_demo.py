"""DenseDINO on built-in scenes with a small ViT/8, on a CPU.

The views overlap by the paper's bounds, and the mean patch token is the view's
representation, as in dino_vit-t8_demo.py.
"""

_base_ = ['dino_vit-t8_demo.py']
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
        view=dict(loss_weight=0.5),
        points=dict(
            type='PointHead',
            points=4,
            out_dims=256,
            teacher_temp=0.02,
            center_momentum=0.8,
            loss_weight=0.5,
            projector=dict(hidden_dims=256, bottleneck_dims=64),
        ),
    )
)
