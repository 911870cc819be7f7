"""LOCA on built-in scenes with a small ViT/8, on a CPU."""

_base_ = [
    '../_base_/quickstart.py',
    '../_base_/data/demo.py',
    '../_base_/models/loca_vit.py',
]
# Small data and few steps want another recipe than the papers' long runs: see
# selfpatch_vit-t8_demo.py. Grey views, as colour tells nothing of the classes; half of
# the reference visible, from which places are learned sooner.
_view = dict(grayscale=1.0, blur=0.1)
_large = dict(size=64, scale=(0.32, 1.0), **_view)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(
                type='MultiCrop',
                views=[
                    dict(role='reference', flip=0.0, **_large),
                    dict(role='random', **_large),
                    dict(role='focal', count=4, size=32, scale=(0.1, 0.32), **_view),
                ],
            )
        ]
    )
)
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=96, depth=3, num_heads=3),
        patch_size=8,
        img_size=64,
        drop_path_rate=0.0,
        pos_embed_std=96**-0.5,
    ),
    heads=dict(
        position=dict(grid=8, num_heads=3, mask_ratio=0.5),
        cluster=dict(
            out_dims=256,
            teacher_temp=0.025,
            projector=dict(hidden_dims=256, bottleneck_dims=64),
        ),
    ),
    drop=dict(random=dict(keep=24)),
    teacher_momentum=0.993,
)
