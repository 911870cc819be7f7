"""Semantic FPN on CamVid with the quickstarts' ViT/8, a few minutes on a CPU.

For trying the way from pretraining to a segmentor, and for tests: the pictures are a
third of their size. Measured: docs/downstream_mmseg.md.
"""

_base_ = ['_base_/semantic_fpn.py', '_base_/data/camvid.py', '_base_/runtime.py']
crop_size = (128, 160)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        type='RandomResize', scale=(240, 180), ratio_range=(0.75, 1.5), keep_ratio=True
    ),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(240, 180), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8, num_workers=1, dataset=dict(pipeline=train_pipeline)
)
val_dataloader = test_dataloader = dict(
    batch_size=1, num_workers=1, dataset=dict(pipeline=test_pipeline)
)
model = dict(
    data_preprocessor=dict(size=crop_size, seg_pad_val=_base_.ignore_index),
    backbone=dict(
        type='VisionTransformer',
        img_size=(64, 64),
        patch_size=8,
        patch_bias=True,
        embed_dims=96,
        num_layers=3,
        num_heads=3,
        out_origin=True,  # three blocks and their input: four maps
        out_indices=(0, 1, 2),
        with_cls_token=False,
        final_norm=True,  # False for the SelfPatch quickstart's
        norm_cfg=dict(type='LN', eps=1e-6),
    ),
    neck=[
        dict(
            type='densessl.ViTFeaturePyramid',
            embed_dims=96,
            patch_size=8,
            norm_cfg=dict(type='SyncBN'),
        ),
        dict(type='FPN', in_channels=[96] * 4, out_channels=64, num_outs=4),
    ],
    decode_head=dict(
        in_channels=[64] * 4,
        channels=64,
        num_classes=_base_.num_classes,
        ignore_index=_base_.ignore_index,
    ),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=300, val_interval=300)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=30, end=300),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=300))
