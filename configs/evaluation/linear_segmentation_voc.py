"""Linear segmentation of VOC 2012, train + aug, 448 px, mIoU over 21 classes.

The folder is VOC2012 with ImageSets/Segmentation/trainaug.txt and SegmentationClassAug
added; without them: --cfg-options protocol.train_split=train
"""

_base_ = ['linear_segmentation.py']
protocol = dict(
    classes=[
        'background',
        'aeroplane',
        'bicycle',
        'bird',
        'boat',
        'bottle',
        'bus',
        'car',
        'cat',
        'chair',
        'cow',
        'dining table',
        'dog',
        'horse',
        'motorbike',
        'person',
        'potted plant',
        'sheep',
        'sofa',
        'train',
        'tv/monitor',
    ],
    train_split='trainaug',
    cache='fp16',  # 6 GiB for a ViT-S/16; 'none' keeps nothing
)
data_root = 'data/VOCdevkit/VOC2012'
