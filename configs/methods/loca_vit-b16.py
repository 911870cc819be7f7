"""LOCA (WACV 2024), ViT-B/16, ImageNet-1K, 600 epochs, 8 x 128 images.

Follows the authors' code where it differs from the paper; see docs/methods/loca.md.
Not yet run here.
"""

_base_ = [
    '../_base_/runtime.py',
    '../_base_/data/imagenet_loca.py',
    '../_base_/models/loca_vit.py',
]
train_cfg = dict(max_epochs=600)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.1),
    clip_grad=dict(type='norm', max_norm=1.0),
)
default_hooks = dict(
    schedule=dict(
        warmup_epochs=15,
        min_lr=0.01,
        relative=True,
        end_weight_decay=None,
        base_batch_size=1024,
        product=True,
    )
)
