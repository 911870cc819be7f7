"""Cityscapes, 19 classes; crops of 512 x 1024 px."""

_base_ = ['mmseg::_base_/datasets/cityscapes.py']
num_classes = 19
