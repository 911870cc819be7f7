"""EsViT on Swin: the mean token, the view task, and regions matched by similarity.

Total loss: the mean of the two. GLSD differs by ``matching='geometric'`` alone.
"""

_head = dict(
    out_dims=65536,
    teacher_temp=dict(start=0.04, end=0.07, warmup_epochs=30),
    projector=dict(norm_last_layer=False),
)
model = dict(
    type='SelfDistillation',
    backbone=dict(
        type='SwinTransformer', arch='tiny', window_size=7, drop_path_rate=0.1
    ),
    neck=dict(type='AveragePoolNeck'),
    heads=dict(
        view=dict(type='ViewHead', **_head),
        region=dict(type='RegionHead', matching='similarity', **_head),
    ),
    average_losses=True,
    teacher_momentum=0.996,
)
