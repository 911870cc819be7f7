"""GLSD on built-in scenes with a small Swin: under 4 minutes on 2 CPU cores."""

_base_ = [
    '../_base_/quickstart.py',
    '../_base_/data/demo.py',
    '../_base_/models/esvit_swin.py',
]
# Small data and few steps want another recipe than the papers' long runs: see
# selfpatch_vit-t8_demo.py. Two stages of 4-pixel patches give tokens of 8 pixels.
_head = dict(
    out_dims=256,
    center_momentum=0.8,
    teacher_temp=0.01,
    projector=dict(hidden_dims=256, bottleneck_dims=64, norm_last_layer=True),
)
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=48, depths=[2, 2], num_heads=[2, 4]),
        img_size=64,
        window_size=[4, 4],
        drop_path_rate=0.0,
    ),
    heads=dict(view=_head, region=dict(matching='geometric', **_head)),
    teacher_momentum=0.993,
)
train_cfg = dict(max_epochs=8)
