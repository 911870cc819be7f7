"""Linear classification by SGD on the last 4 blocks: class tokens, or averages.

For backbones other than ViT and Swin: --cfg-options extractor.layers=1
"""

protocol = dict(
    type='LinearClassification',
    epochs=100,
    batch_size=1024,
    lrs=[0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3],
    augment=True,
)
extractor = dict(layers=4, pool='auto')
data_root = 'data/imagenet'
