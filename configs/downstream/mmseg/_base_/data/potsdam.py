"""ISPRS Potsdam, 6 classes; tiles of 512 x 512 px."""

_base_ = ['mmseg::_base_/datasets/potsdam.py']
num_classes = 6
