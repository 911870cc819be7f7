"""LOCA without clusters, ViT-B/16, ImageNet-1K, 100 epochs. Not yet run here.

As in the authors' code: queries carry no position embeddings, and the reference goes
through the trained encoder, which gets its visible patches only.
"""

_base_ = ['loca_vit-b16_100e.py']
model = dict(
    heads=dict(position=dict(mask_ratio=0.0, encoder='student'), cluster=None),
    drop=dict(reference=dict(type='PatchDrop', keep=0.2, kind='run')),
    no_positions=['random', 'focal'],
)
