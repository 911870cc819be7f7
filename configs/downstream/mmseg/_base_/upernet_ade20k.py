"""UPerNet on ADE20K: 160,000 steps of 8 x 2 pictures of 512 x 512 px."""

_base_ = ['segmentor.py', 'data/ade20k.py', 'schedules/160k.py']
train_dataloader = dict(batch_size=2)
auto_scale_lr = dict(enable=False, base_batch_size=16)
_head = dict(dropout_ratio=0.1, norm_cfg=dict(type='SyncBN'))
model = dict(
    decode_head=dict(
        type='UPerHead',
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        **_head,
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_index=2,
        num_convs=1,
        concat_input=False,
        channels=256,
        num_classes=150,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
        **_head,
    ),
)
