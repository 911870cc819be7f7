"""Built-in demo scenes in two small grey views: for a few minutes on a CPU.

Grey, because the classes of the scenes do not depend on colour: without the short cut of
colour, a short run learns textures and shapes.
"""

_base_ = ['loader.py']
_view = dict(role='global', size=64, scale=(0.4, 1.0), grayscale=1.0, blur=0.1)
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    # an epoch shows 2000 images, whatever the folder that --data names
    sampler=dict(length=2000),
    dataset=dict(
        type='DemoScenes',
        length=2000,
        size=128,
        pipeline=[dict(type='MultiCrop', views=[dict(count=2, **_view)])],
    ),
)
