"""SelfPatch on MoBY: no class token, class attention, the view and the patch task.

Backbone and neck as in SelfPatch on DINO, but for MoBY's drop path.
"""

_head = dict(out_dims=256, hidden_dims=4096, temp=0.2)
model = dict(
    type='SelfDistillation',
    backbone=dict(
        type='VisionTransformer',
        arch='small',
        patch_size=16,
        cls_token=False,
        final_norm=False,
        drop_path_rate=0.2,
    ),
    neck=dict(type='ClassAttentionNeck', depth=2),
    heads=dict(
        view=dict(type='ContrastiveHead', queue_length=4096, **_head),
        selfpatch=dict(
            type='ContrastiveSelfPatchHead',
            top_k=4,
            window=3,
            border='wrap',
            negatives=False,
            loss_weight=0.1,
            **_head,
        ),
    ),
    teacher_momentum=0.99,
)
