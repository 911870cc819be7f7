"""EsViT, ViL-T, ImageNet-1K, 300 epochs, 8 x 64 images.

Heads as in the authors' command; the paper's Table 6 has 3, 3, 6, 12
(``model.backbone.num_heads='[3,3,6,12]'``). As in their code, tokens attend to one
random neighbour window until 75 % of the training, then to all
(``model.backbone.neighbours=all`` from the start). Not yet run here.
"""

_base_ = ['esvit_swin-t-w7.py']
model = dict(
    backbone=dict(
        _delete_=True,
        type='VisionLongformer',
        arch='tiny',
        num_heads=[3, 6, 12, 24],
        neighbours='random',
        drop_path_rate=0.1,
    )
)
