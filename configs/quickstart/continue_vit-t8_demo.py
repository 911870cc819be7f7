"""DINO continued on own pictures from a small ViT/8: the recipe of docs/continue.md, on a CPU.

To be given ``--data`` and ``--init-from``. Smaller crops and more colour than in
dino_vit-t8_demo.py, for photographs.
"""

_base_ = ['dino_vit-t8_demo.py']
_view = dict(role='global', size=64, scale=(0.1, 0.4), grayscale=0.2, blur=0.1)
train_dataloader = dict(
    dataset=dict(pipeline=[dict(type='MultiCrop', views=[dict(count=2, **_view)])])
)
train_cfg = dict(max_epochs=4)
optim_wrapper = dict(optimizer=dict(lr=2e-3), layer_decay=0.75)
model = dict(freeze_backbone_epochs=1, teacher_momentum=0.998)
default_hooks = dict(
    schedule=dict(warmup_epochs=0.5),
    probe=dict(segmentation='demo', guard='warn', interval=1, size=128),
    report=dict(probe=False),
)
