"""SUN RGB-D, 37 classes, colours alone; label 0 is none, SPLIT val its test pictures."""

_base_ = ['folder.py']
classes = [
    'wall',
    'floor',
    'cabinet',
    'bed',
    'chair',
    'sofa',
    'table',
    'door',
    'window',
    'bookshelf',
    'picture',
    'counter',
    'blinds',
    'desk',
    'shelves',
    'curtain',
    'dresser',
    'pillow',
    'mirror',
    'floor mat',
    'clothes',
    'ceiling',
    'books',
    'refrigerator',
    'television',
    'paper',
    'towel',
    'shower curtain',
    'box',
    'whiteboard',
    'person',
    'night stand',
    'toilet',
    'sink',
    'lamp',
    'bathtub',
    'bag',
]
num_classes = len(classes)
_dataset = dict(
    data_root='data/sunrgbd', metainfo=dict(classes=classes), reduce_zero_label=True
)
train_dataloader = dict(dataset=_dataset)
val_dataloader = test_dataloader = dict(dataset=_dataset)
