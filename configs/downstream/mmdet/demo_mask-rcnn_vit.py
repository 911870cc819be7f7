"""Mask R-CNN on demo scenes with a ViT/8 of 4 blocks; see docs/downstream_mmdet.md."""

_base_ = ['_base_/demo.py']
# As loca_vit_demo pretrains it with model.backbone.arch.depth=4: no class token.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch=dict(
            embed_dims=96, num_layers=4, num_heads=3, feedforward_channels=4 * 96
        ),
        img_size=64,
        patch_size=8,
        out_indices=[0, 1, 2, 3],
        out_type='featmap',
        with_cls_token=False,
        final_norm=True,
        frozen_stages=-1,
    ),
    neck=[
        dict(
            type='densessl.ViTFeaturePyramid',
            embed_dims=96,
            patch_size=8,
            norm_cfg=dict(type='BN'),
        ),
        dict(type='FPN', in_channels=[96] * 4, out_channels=64, num_outs=4),
    ],
)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=0.0)))
)
