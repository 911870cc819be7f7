"""Correspondence of a picture with its mirrored, recoloured copy; any folder.

Over the 10 most similar pairs (EsViT, arXiv:2106.09785) and over all tokens (GLSD).
Figures: docs/evaluation.md.
"""

data_root = 'data/davis'
extractor = dict(layers=1)
protocol = dict(type='Correspondence')
