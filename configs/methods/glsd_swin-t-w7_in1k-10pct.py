"""GLSD, Swin-T/7, 10 % of each class of ImageNet-1K, 8 x 64 images.

The schedule of the low-data study is not at hand, so 300 epochs stand here. Not yet run
here.
"""

_base_ = ['glsd_swin-t-w7.py']
train_dataloader = dict(dataset=dict(fraction=0.1))
