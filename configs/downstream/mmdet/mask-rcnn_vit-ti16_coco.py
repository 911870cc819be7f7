"""Mask R-CNN with FPN, ViT-Ti/16, COCO, 1x: as mask-rcnn_vit-s16_coco.py. Not yet run here."""

_base_ = ['mask-rcnn_vit-s16_coco.py']
_width = 192
model = dict(
    backbone=dict(
        arch=dict(embed_dims=_width, num_heads=3, feedforward_channels=4 * _width)
    ),
    neck=[
        dict(type='densessl.ViTFeaturePyramid', embed_dims=_width, patch_size=16),
        dict(type='FPN', in_channels=[_width] * 4, out_channels=256, num_outs=5),
    ],
)
