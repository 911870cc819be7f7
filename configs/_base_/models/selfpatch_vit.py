"""SelfPatch on a ViT: no class token, class attention, the view and the patch task.

As in the authors' code: no final norm in the backbone, neighbours wrap around the
border, and the view's centre averages the teacher's outputs of all views.
"""

model = dict(
    type='SelfDistillation',
    backbone=dict(
        type='VisionTransformer',
        arch='small',
        patch_size=16,
        cls_token=False,
        final_norm=False,
        drop_path_rate=0.1,
    ),
    neck=dict(type='ClassAttentionNeck', depth=2),
    heads=dict(
        view=dict(
            type='ViewHead',
            out_dims=65536,
            teacher_temp=0.04,
            center_views='all',
            projector=dict(norm_last_layer=True),
        ),
        selfpatch=dict(
            type='SelfPatchHead',
            out_dims=4096,
            top_k=4,
            window=3,
            border='wrap',
            loss_weight=0.1,
            teacher_temp=0.04,
            projector=dict(norm_last_layer=True),
        ),
    ),
    teacher_momentum=0.996,
)
