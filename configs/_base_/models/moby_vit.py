"""MoBY on a ViT: the class token, a predictor, and queues of keys.

Drop path is the student's alone.
"""

model = dict(
    type='SelfDistillation',
    backbone=dict(
        type='VisionTransformer', arch='small', patch_size=16, drop_path_rate=0.2
    ),
    neck=dict(type='ClassTokenNeck'),
    heads=dict(
        view=dict(
            type='ContrastiveHead',
            out_dims=256,
            hidden_dims=4096,
            queue_length=4096,
            temp=0.2,
        )
    ),
    teacher_momentum=0.99,
)
