"""LOCA beside DINO's view task, on built-in scenes, on a CPU.

Two global views predict each other, and each is the reference of all other views.
"""

_base_ = ['dino_vit-t8_demo.py']
_view = dict(role='local', size=32, scale=(0.1, 0.32), grayscale=1.0, blur=0.1)
_global = dict(role='global', size=64, scale=(0.4, 1.0), grayscale=1.0, blur=0.1)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(
                type='MultiCrop',
                views=[dict(count=2, **_global), dict(count=2, **_view)],
            )
        ]
    )
)
_roles = dict(reference_role='global', query_roles=['global', 'local'])
model = dict(
    heads=dict(
        position=dict(type='PositionHead', grid=8, num_heads=3, **_roles),
        cluster=dict(
            type='ClusterHead',
            out_dims=256,
            projector=dict(hidden_dims=256, bottleneck_dims=64),
            **_roles,
        ),
    )
)
