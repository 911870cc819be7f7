"""DINO's view task and regions by place, from DINOv2's public ViT-S/14 (arXiv:2304.07193).

timm's model, 2 x 224 + 8 x 98 (multiples of 14). Regions take the place of DINOv2's masked
patches, which are not built here. Not yet run here at this size.
"""

_base_ = ['dino_vit-s16.py']
_global = dict(role='global', size=224, scale=(0.4, 1.0))
_local = dict(role='local', count=8, size=98, scale=(0.05, 0.4), blur=0.5)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImage', lazy=True),
            dict(
                type='MultiCrop',
                views=[
                    dict(blur=1.0, **_global),
                    dict(blur=0.1, solarize=0.2, **_global),
                    _local,
                ],
            ),
        ]
    )
)
model = dict(
    backbone=dict(_delete_=True, type='TimmBackbone', name='vit_small_patch14_dinov2'),
    heads=dict(
        region=dict(
            type='RegionHead',
            matching='geometric',
            out_dims=4096,
            loss_weight=0.5,
            teacher_temp=0.04,
            projector=dict(norm_last_layer=True),
        )
    ),
)
