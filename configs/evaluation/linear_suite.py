"""Logistic regression by L-BFGS on many small sets (CLIP, arXiv:2103.00020, App. A.3).

The data folder holds one set, or sets in folders of their own: see docs/evaluation.md.
"""

protocol = dict(
    type='LinearSuite', sets=None, metric='accuracy', max_iterations=1000, resize=224
)
extractor = dict(layers=1, pool='auto')
data_root = 'data/linear_suite'
