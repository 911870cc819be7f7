"""ImageNet-1K, 4 x 224 pixels that overlap: 2 global views and 2 more of their scale."""

_base_ = ['loader.py']
_view = dict(size=224, scale=(0.25, 1.0))
train_dataloader = dict(
    batch_size=64,
    dataset=dict(
        data_root='data/imagenet/train',
        pipeline=[
            dict(type='LoadImage', lazy=True),
            dict(
                type='MultiCrop',
                views=[
                    dict(role='global', blur=1.0, **_view),
                    dict(role='global', blur=0.1, solarize=0.2, **_view),
                    dict(role='local', count=2, blur=0.5, **_view),
                ],
                min_overlap=(0.02, 0.01),
            ),
        ],
    ),
)
