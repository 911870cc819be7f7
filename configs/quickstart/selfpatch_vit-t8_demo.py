"""SelfPatch on built-in scenes with a small ViT/8: about 3 minutes on 2 CPU cores."""

_base_ = [
    '../_base_/quickstart.py',
    '../_base_/data/demo.py',
    '../_base_/models/selfpatch_vit.py',
]
# Small data and few steps want another recipe than the papers' long runs: small
# projectors, few prototypes, a faster teacher and centre, and sharper targets,
# without which the outputs stay uniform. The patch loss counts in full.
_head = dict(
    out_dims=256,
    center_momentum=0.8,
    projector=dict(hidden_dims=256, bottleneck_dims=64),
)
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=96, depth=3, num_heads=3),
        patch_size=8,
        img_size=64,
        drop_path_rate=0.0,
    ),
    neck=dict(num_heads=3),
    heads=dict(
        view=dict(teacher_temp=0.01, **_head),
        selfpatch=dict(teacher_temp=0.02, loss_weight=1.0, **_head),
    ),
    teacher_momentum=0.993,
)
