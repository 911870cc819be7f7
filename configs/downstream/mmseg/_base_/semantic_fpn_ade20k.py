"""Semantic FPN on ADE20K: 40,000 steps of 8 x 4 pictures of 512 x 512 px."""

_base_ = ['semantic_fpn.py', 'data/ade20k.py', 'schedules/40k.py']
train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(enable=False, base_batch_size=32)
