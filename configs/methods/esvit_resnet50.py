"""EsViT, ResNet-50 (timm's), ImageNet-1K, 300 epochs, 8 x 64 images.

Optimiser and crops of DINO's ResNet-50: SGD, lr 0.03, constant weight decay 1e-4, crops
0.14-1 and 0.05-0.14. EsViT's own for this network are not at hand. Not yet run here.
"""

_base_ = ['esvit_swin-t-w7.py']
model = dict(backbone=dict(_delete_=True, type='TimmBackbone', name='resnet50'))
sync_bn = 'torch'
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.03, momentum=0.9, weight_decay=1e-4)
)
default_hooks = dict(schedule=dict(end_weight_decay=None))
_global = dict(role='global', size=224, scale=(0.14, 1.0))
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImage', lazy=True),
            dict(
                type='MultiCrop',
                views=[
                    dict(blur=1.0, **_global),
                    dict(blur=0.1, solarize=0.2, **_global),
                    dict(role='local', count=8, size=96, scale=(0.05, 0.14), blur=0.5),
                ],
            ),
        ]
    )
)
