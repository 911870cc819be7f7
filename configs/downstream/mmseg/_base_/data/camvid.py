"""CamVid in 11 classes; label 11 is void."""

_base_ = ['folder.py']
classes = [
    'sky',
    'building',
    'pole',
    'road',
    'pavement',
    'tree',
    'sign',
    'fence',
    'car',
    'pedestrian',
    'bicyclist',
]
num_classes = len(classes)
ignore_index = 11
_dataset = dict(data_root='data/camvid', metainfo=dict(classes=classes))
train_dataloader = dict(dataset=_dataset)
val_dataloader = test_dataloader = dict(dataset=_dataset)
val_evaluator = test_evaluator = dict(ignore_index=ignore_index)
