"""Pascal VOC 2012 with SBD's masks (trainaug), 20 classes and background."""

_base_ = ['mmseg::_base_/datasets/pascal_voc12_aug.py']
num_classes = 21
