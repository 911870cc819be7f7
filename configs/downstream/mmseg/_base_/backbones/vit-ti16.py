"""ViT-Ti/16 of MMSegmentation: maps of blocks 3, 6, 9 and 12, of 192 channels.

As exported from DINO, DenseDINO and MoBY: class token, norm after the last block. Others:
SelfPatch (also with MoBY)  model.backbone.with_cls_token=False model.backbone.final_norm=False
LOCA, EsViT                 model.backbone.with_cls_token=False
"""

backbone = dict(
    type='VisionTransformer',
    img_size=(224, 224),  # of the table of positions; pictures may have any size
    patch_size=16,
    patch_bias=True,
    embed_dims=192,
    num_layers=12,
    num_heads=3,
    out_indices=(2, 5, 8, 11),
    with_cls_token=True,
    final_norm=True,
    drop_path_rate=0.1,
    norm_cfg=dict(type='LN', eps=1e-6),
)
channels = [192] * 4
pyramid = [
    dict(
        type='densessl.ViTFeaturePyramid',
        embed_dims=192,
        patch_size=16,
        norm_cfg=dict(type='SyncBN'),
    )
]
