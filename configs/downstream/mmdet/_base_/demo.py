"""A small Mask R-CNN on demo scenes in COCO format, for minutes on a CPU.

Small heads and 128 px pictures; levels at strides 4 to 32, anchors of 32 to 256 px.
"""

_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', 'densessl.py']
_channels = 64
_classes = 6
_root = 'data/demo_coco/'
_size = (128, 128)
model = dict(
    rpn_head=dict(
        in_channels=_channels,
        feat_channels=_channels,
        anchor_generator=dict(strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=_channels),
        bbox_head=dict(
            in_channels=_channels, fc_out_channels=256, num_classes=_classes
        ),
        mask_roi_extractor=dict(out_channels=_channels),
        mask_head=dict(
            num_convs=2,
            in_channels=_channels,
            conv_out_channels=_channels,
            num_classes=_classes,
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=20)),
)
_meta = dict(classes=('ball', 'crate', 'ring', 'star', 'kite', 'leaf'))
_load = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
]
_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
_resize = dict(type='Resize', scale=_size, keep_ratio=True)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True),
    batch_sampler=None,
    dataset=dict(
        data_root=_root,
        metainfo=_meta,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        filter_cfg=dict(min_size=1),
        pipeline=[
            *_load,
            _resize,
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        data_root=_root,
        metainfo=_meta,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        pipeline=[
            _load[0],
            _resize,
            _load[1],
            dict(type='PackDetInputs', meta_keys=_keys),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

_steps = 400
train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters=_steps, val_interval=_steps
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        by_epoch=False,
        begin=50,
        end=_steps,
    ),
]
default_hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(by_epoch=False, interval=_steps),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
