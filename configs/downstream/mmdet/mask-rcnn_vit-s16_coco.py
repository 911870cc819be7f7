"""Mask R-CNN with FPN, ViT-S/16, COCO, 1x: the fine-tuning of SelfPatch (arXiv:2206.07990).

AdamW, lr 5e-5 at 8 pictures a step (4 GPUs of 2), 12 epochs. Blocks 4, 6, 8 and 12 at
strides 4, 8, 16 and 32; 6 heads, as in pretraining. Class token and final norm as DINO has
them; docs/downstream_mmdet.md says how to leave them out. Not yet run here.
"""

_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '_base_/densessl.py']
_width = 384
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch=dict(
            embed_dims=_width,
            num_layers=12,
            num_heads=6,
            feedforward_channels=4 * _width,
        ),
        img_size=224,  # of pretraining; pictures may have any size
        patch_size=16,
        out_indices=[3, 5, 7, 11],
        out_type='featmap',
        with_cls_token=True,
        final_norm=True,
    ),
    neck=[
        dict(type='densessl.ViTFeaturePyramid', embed_dims=_width, patch_size=16),
        dict(type='FPN', in_channels=[_width] * 4, out_channels=256, num_outs=5),
    ],
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=5e-5, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys=dict(
            pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0)
        ),
    ),
)
auto_scale_lr = dict(base_batch_size=8)  # what --auto-scale-lr takes lr to be for
