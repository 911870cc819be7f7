"""DINO on demo scenes with a head, a transform, a hook and a backbone of one's own.

The folder of this file must be on PYTHONPATH.
"""

_base_ = ['../../configs/quickstart/dino_vit-t8_demo.py']
custom_imports = dict(imports=['place_regression', 'parts'])
model = dict(
    backbone=dict(_delete_=True, type='PatchMixer', embed_dims=96),
    heads=dict(place=dict(type='PlaceRegressionHead', loss_weight=0.5)),
)
_view = dict(role='global', size=64, scale=(0.4, 1.0), grayscale=1.0, blur=0.1)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='MultiCrop', views=[dict(count=2, **_view)]),
            dict(type='EraseBlock', share=0.3),
        ]
    )
)
custom_hooks = [dict(type='TeacherGapHook', interval=20)]
