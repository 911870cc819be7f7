"""Mask R-CNN with FPN, Swin-T, COCO, 1x: MMDetection's own recipe, without its weights.

AdamW, lr 1e-4 at 16 pictures a step (8 GPUs of 2), 12 epochs. Not yet run here.
"""

_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', '_base_/densessl.py']
model = dict(backbone=dict(init_cfg=None, convert_weights=False))
