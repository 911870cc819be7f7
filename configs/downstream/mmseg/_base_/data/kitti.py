"""KITTI's 200 pictures with masks, Cityscapes' 19 classes; the split is ours."""

_base_ = ['folder.py']
num_classes = 19
_dataset = dict(
    type='CityscapesDataset',
    data_root='data/kitti',
    img_suffix='.png',
    seg_map_suffix='.png',
)
train_dataloader = dict(dataset=_dataset)
val_dataloader = test_dataloader = dict(dataset=_dataset)
