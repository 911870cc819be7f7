"""SUIM, pictures under water in 8 classes; SPLIT val its 110 test pictures."""

_base_ = ['folder.py']
classes = [
    'water',
    'human diver',
    'plant',
    'wreck or ruin',
    'robot',
    'reef or invertebrate',
    'fish or vertebrate',
    'sea floor or rock',
]
num_classes = len(classes)
_dataset = dict(data_root='data/suim', metainfo=dict(classes=classes))
train_dataloader = dict(dataset=_dataset)
val_dataloader = test_dataloader = dict(dataset=_dataset)
