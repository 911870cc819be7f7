"""Depth by a linear head on frozen tokens; metrics of LOCA's Table 6 (arXiv:2212.02400).

A head in the style of DPT on the last 4 blocks of a plain ViT:
--cfg-options protocol.head=dpt extractor.layers=4
"""

protocol = dict(
    type='DepthEstimation',
    head='linear',
    units_per_m=256,  # of a 16-bit PNG
    size=448,
    epochs=25,
    batch_size=16,
    lr=1e-3,
    train_size=112,
    cache='fp16',
)
extractor = dict(layers=1)
data_root = 'data/depth'
