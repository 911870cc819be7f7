"""Video object segmentation on DAVIS 2017; ``protocol.year=2016`` for DAVIS 2016.

First mask given, labels from the nearest tokens of the first and 7 previous frames
(arXiv:2104.14294, Sec. 4.2.2). Figures: docs/evaluation.md.
"""

data_root = 'data/davis'
extractor = dict(layers=1)
protocol = dict(type='VideoSegmentation', year=2017)
