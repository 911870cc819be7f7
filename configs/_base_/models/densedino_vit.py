"""DenseDINO on a ViT: the class token, the view task, and reference points.

As the authors' published command: the view task compares the global views alone, the
points all views; both count the same.
"""

_head = dict(
    out_dims=65536,
    teacher_temp=0.04,
    loss_weight=0.5,
    projector=dict(norm_last_layer=True),
)
model = dict(
    type='SelfDistillation',
    backbone=dict(
        type='VisionTransformer', arch='small', patch_size=16, drop_path_rate=0.1
    ),
    neck=dict(type='ClassTokenNeck'),
    heads=dict(
        view=dict(type='ViewHead', student_views='target', **_head),
        points=dict(type='PointHead', points=4, **_head),
    ),
    teacher_momentum=0.996,
)
