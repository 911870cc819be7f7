"""Linear segmentation of CamVid's 11 classes at 160x128 px, for quickstarts on CPUs.

367 pictures want more and longer steps than VOC's 10,582. Figures: docs/evaluation.md.
"""

_base_ = ['linear_segmentation.py']
protocol = dict(
    classes=[
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
    ],
    ignore=[11],  # void
    size=[128, 160],
    head=dict(epochs=60, batch_size=20, lr=1.0, train_mask_size=32),
)
data_root = 'data/camvid'
