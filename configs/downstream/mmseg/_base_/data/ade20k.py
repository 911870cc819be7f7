"""ADE20K, 150 classes."""

_base_ = ['mmseg::_base_/datasets/ade20k.py']
num_classes = 150
