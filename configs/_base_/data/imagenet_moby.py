"""ImageNet-1K, two views of 224 pixels with the crop scales of MoBY and BYOL's colours."""

_base_ = ['loader.py']
_view = dict(role='global', size=224, scale=(0.08, 1.0))
train_dataloader = dict(
    batch_size=64,
    dataset=dict(
        data_root='data/imagenet/train',
        pipeline=[
            dict(type='LoadImage', lazy=True),
            dict(
                type='MultiCrop',
                views=[
                    dict(blur=1.0, **_view),
                    dict(blur=0.1, solarize=0.2, **_view),
                ],
            ),
        ],
    ),
)
