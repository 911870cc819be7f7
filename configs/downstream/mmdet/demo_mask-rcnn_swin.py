"""Mask R-CNN on demo scenes with the quickstart's Swin; see docs/downstream_mmdet.md."""

_base_ = ['_base_/demo.py']
# Two stages, strides 4 and 8, as glsd_swin_demo pretrains them; FPN adds 16 and 32.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet.SwinTransformer',
        pretrain_img_size=64,
        embed_dims=48,
        depths=[2, 2],
        num_heads=[2, 4],
        strides=[4, 2],
        window_size=4,
        out_indices=[0, 1],
        drop_path_rate=0.0,
        frozen_stages=-1,
    ),
    neck=dict(in_channels=[48, 96], out_channels=64, num_outs=4),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(relative_position_bias_table=dict(decay_mult=0.0))
    )
)
