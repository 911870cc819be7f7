"""DenseDINO, ViT-Ti/16, with the 2 global views alone: the study of views.

Not yet run here.
"""

_base_ = ['densedino_vit-ti16.py']
_view = dict(role='global', size=224, scale=(0.25, 1.0))
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImage', lazy=True),
            dict(
                type='MultiCrop',
                views=[dict(blur=1.0, **_view), dict(blur=0.1, solarize=0.2, **_view)],
                min_overlap=(0.02, 0.01),
            ),
        ]
    )
)
