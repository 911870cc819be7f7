"""DINO on a ViT: the class token, and the view task."""

model = dict(
    type='SelfDistillation',
    backbone=dict(
        type='VisionTransformer', arch='small', patch_size=16, drop_path_rate=0.1
    ),
    neck=dict(type='ClassTokenNeck'),
    heads=dict(
        view=dict(
            type='ViewHead',
            out_dims=65536,
            teacher_temp=0.04,
            projector=dict(norm_last_layer=True),
        )
    ),
    teacher_momentum=0.996,
)
