"""LOCA on a ViT: no class token; the place and the cluster of every query patch.

As in the authors' code: losses average over the tokens in Omega of the whole batch, and
position embeddings start with a standard deviation of 1 / sqrt(width) and are resized
bilinearly.
"""

model = dict(
    type='SelfDistillation',
    backbone=dict(
        type='VisionTransformer',
        arch='base',
        patch_size=16,
        cls_token=False,
        drop_path_rate=0.1,
        pos_embed_resize='bilinear',
        pos_embed_std=768**-0.5,
    ),
    # LOCA has none; the mean token is what image-level clusters look at
    neck=dict(type='AveragePoolNeck'),
    heads=dict(
        position=dict(
            type='PositionHead', grid=14, mask_ratio=0.8, mask='run', average='token'
        ),
        cluster=dict(
            type='ClusterHead',
            out_dims=4096,
            sinkhorn=3,
            me_max=True,
            teacher_temp=0.05,
            average='token',
        ),
    ),
    drop=dict(random=dict(type='PatchDrop', keep=70, kind='random')),
    teacher_momentum=0.996,
)
