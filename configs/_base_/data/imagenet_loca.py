"""ImageNet-1K, one reference and ten queries: a random one (224) and nine focal (96)."""

_base_ = ['loader.py']
_large = dict(size=224, scale=(0.32, 1.0))
train_dataloader = dict(
    batch_size=128,
    dataset=dict(
        data_root='data/imagenet/train',
        pipeline=[
            dict(type='LoadImage', lazy=True),
            dict(
                type='MultiCrop',
                views=[
                    dict(role='reference', flip=0.0, blur=1.0, **_large),
                    dict(role='random', blur=0.1, solarize=0.2, **_large),
                    dict(role='focal', count=9, size=96, scale=(0.05, 0.32), blur=0.5),
                ],
            ),
        ],
    ),
)
