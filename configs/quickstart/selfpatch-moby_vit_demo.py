"""SelfPatch on MoBY, with negatives, on built-in scenes with a small ViT/8, on a CPU."""

_base_ = [
    '../_base_/quickstart.py',
    '../_base_/data/demo.py',
    '../_base_/models/selfpatch_moby_vit.py',
]
# Small data and few steps want another recipe than the papers' long runs: see
# selfpatch_vit-t8_demo.py. Small projectors, a higher learning rate, a faster teacher, and
# short queues, whose keys are not much older than it; the patch loss counts in full.
optim_wrapper = dict(optimizer=dict(lr=2e-2))
_head = dict(out_dims=64, hidden_dims=256, temp=0.1)
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=96, depth=3, num_heads=3),
        patch_size=8,
        img_size=64,
        drop_path_rate=0.0,
    ),
    neck=dict(num_heads=3),
    heads=dict(
        view=dict(queue_length=128, **_head),
        selfpatch=dict(negatives=True, loss_weight=1.0, **_head),
    ),
    teacher_momentum=0.97,
)
