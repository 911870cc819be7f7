"""DenseDINO, ViT-Ti/16, ImageNet-1K, 6 x 224, 100 epochs, 8 x 64 images.

Follows the authors' published command; see docs/methods/densedino.md. Not yet run here.
"""

_base_ = ['densedino_vit-s16.py']
_view = dict(size=224, scale=(0.25, 1.0))
model = dict(backbone=dict(arch='tiny'))
train_cfg = dict(max_epochs=100)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImage', lazy=True),
            dict(
                type='MultiCrop',
                views=[
                    dict(role='global', blur=1.0, **_view),
                    dict(role='global', blur=0.1, solarize=0.2, **_view),
                    dict(role='local', count=4, blur=0.5, **_view),
                ],
                min_overlap=(0.02, 0.01),
            ),
        ]
    )
)
