"""ImageNet-1K, 2 x 224 + 8 x 96 with the crop scales of SelfPatch."""

_base_ = ['loader.py']
_global = dict(role='global', size=224, scale=(0.25, 1.0))
train_dataloader = dict(
    batch_size=128,
    dataset=dict(
        data_root='data/imagenet/train',
        pipeline=[
            dict(type='LoadImage', lazy=True),
            dict(
                type='MultiCrop',
                views=[
                    dict(blur=1.0, **_global),
                    dict(blur=0.1, solarize=0.2, **_global),
                    dict(role='local', count=8, size=96, scale=(0.05, 0.25), blur=0.5),
                ],
            ),
        ],
    ),
)
