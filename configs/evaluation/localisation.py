"""Linear segmentation of VOC 2012, its two halves apart (LOCA, arXiv:2212.02400, Table 5)."""

_base_ = ['linear_segmentation_voc.py']
protocol = dict(type='Localisation')
