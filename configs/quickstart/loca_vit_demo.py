"""LOCA on built-in scenes with a small ViT/8, on a CPU."""

_base_ = [
    '../_base_/quickstart.py',
    '../_base_/data/demo.py',
    '../_base_/models/loca_vit.py',
]
# Small data and few steps want another recipe than the papers' long runs. What tells
# the place of a patch is left: colour, brightness and side. Queries carry no position
# embeddings, so that they have to look at the reference, and attend from the start to
# what looks like them: see docs/methods/loca.md for what each is worth.
_view = dict(grayscale=0.0, jitter=0.0, flip=0.0, blur=0.1)
_large = dict(size=64, scale=(0.32, 1.0), **_view)
train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        pipeline=[
            dict(
                type='MultiCrop',
                views=[
                    dict(role='reference', **_large),
                    dict(role='random', **_large),
                    dict(role='focal', count=4, size=32, scale=(0.1, 0.32), **_view),
                ],
            )
        ]
    ),
)
optim_wrapper = dict(optimizer=dict(lr=0.024))
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=96, depth=3, num_heads=3),
        patch_size=8,
        img_size=64,
        drop_path_rate=0.0,
        pos_embed_std=0.5,
    ),
    heads=dict(
        position=dict(grid=8, num_heads=3, mask_ratio=0.2, alike=4.0),
        cluster=dict(
            out_dims=256,
            teacher_temp=0.025,
            projector=dict(hidden_dims=256, bottleneck_dims=64),
        ),
    ),
    drop=dict(random=dict(keep=40)),
    no_positions=['random', 'focal'],
    teacher_momentum=0.993,
)
