"""No GPU, any number of pictures: DenseDINO, a small ViT/8 on views of 64 pixels.

The network, views and settings that docs/methods/densedino.md measures on 367 pictures,
for 3,720 steps of 32 images in place of 372. Measured: docs/guide.md.
"""

_base_ = ['../quickstart/densedino_vit_demo.py']
_view = dict(role='global', size=64, scale=(0.1, 0.4), grayscale=0.2, blur=0.1)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(
                type='MultiCrop',
                views=[dict(count=2, **_view)],
                min_overlap=(0.02, 0.01),
            )
        ]
    )
)
train_cfg = dict(max_epochs=60)
default_hooks = dict(report=dict(probe=False))
