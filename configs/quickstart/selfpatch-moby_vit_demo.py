"""SelfPatch on MoBY on built-in scenes with a small ViT/8, on a CPU."""

_base_ = [
    '../_base_/quickstart.py',
    '../_base_/data/demo.py',
    '../_base_/models/selfpatch_moby_vit.py',
]
# Small data and few steps want another recipe than the papers' long runs: see
# selfpatch_vit-t8_demo.py. The patch loss counts in full.
_head = dict(out_dims=64, hidden_dims=256)
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=96, depth=3, num_heads=3),
        patch_size=8,
        img_size=64,
        drop_path_rate=0.0,
    ),
    neck=dict(num_heads=3),
    heads=dict(
        view=dict(queue_length=512, **_head),
        selfpatch=dict(loss_weight=1.0, **_head),
    ),
)
