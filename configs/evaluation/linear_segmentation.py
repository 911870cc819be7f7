"""Linear segmentation of any folder; name its classes in label order, or their number.

A 1x1 convolution on frozen tokens at 448 px, with the settings for VOC 2012: SGD 0.9,
lr 0.01 x batch / 60, 25 epochs, step at 20. Fewer pictures want more epochs and a
greater lr: see linear_segmentation_camvid.py.
"""

protocol = dict(
    type='LinearSegmentationProtocol',
    classes=2,
    size=448,
    head=dict(
        epochs=25, batch_size=60, lr=0.01, weight_decay=1e-4, train_mask_size=100
    ),
    cache='fp32',
)
extractor = dict(layers=1)
data_root = 'data/segmentation'
