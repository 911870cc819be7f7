"""Swin-T of MMSegmentation, window 7; its four stages are the pyramid."""

backbone = dict(
    type='SwinTransformer',
    embed_dims=96,
    depths=(2, 2, 6, 2),
    num_heads=(3, 6, 12, 24),
    window_size=7,
    drop_path_rate=0.3,
)
channels = [96, 192, 384, 768]
pyramid = []
