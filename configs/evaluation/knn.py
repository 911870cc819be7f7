"""Weighted k-NN classification (arXiv:1805.01978), with the crop and k of DINO."""

protocol = dict(
    type='KNN', ks=[20, 10, 100, 200], temperature=0.07, resize=256, crop=224
)
extractor = dict(layers=1, pool='auto')
data_root = 'data/imagenet'
