"""India Driving Dataset (part I), the 26 classes of its level 3; crops as Cityscapes."""

_base_ = ['mmseg::_base_/datasets/cityscapes.py']
classes = [
    'road',
    'drivable fallback',
    'sidewalk',
    'non-drivable fallback',
    'person or animal',
    'rider',
    'motorcycle',
    'bicycle',
    'autorickshaw',
    'car',
    'truck',
    'bus',
    'vehicle fallback',
    'curb',
    'wall',
    'fence',
    'guard rail',
    'billboard',
    'traffic sign',
    'traffic light',
    'pole',
    'other structure',
    'building',
    'bridge or tunnel',
    'vegetation',
    'sky',
]
num_classes = len(classes)
_dataset = dict(
    type='BaseSegDataset',
    data_root='data/idd',
    metainfo=dict(classes=classes),
    img_suffix='_leftImg8bit.png',
    seg_map_suffix='_gtFine_labellevel3Ids.png',
)
train_dataloader = dict(dataset=_dataset)
val_dataloader = test_dataloader = dict(dataset=_dataset)
