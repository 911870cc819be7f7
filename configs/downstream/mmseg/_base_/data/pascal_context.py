"""Pascal-Context, 59 classes and background; crops of 480 x 480 px."""

_base_ = ['mmseg::_base_/datasets/pascal_context.py']
num_classes = 60
