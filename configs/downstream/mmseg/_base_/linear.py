"""Linear decoder (Segmenter's, arXiv:2105.05633): a 1x1 convolution on the last map.

Batches of 8 x 2. Whole network trained; windows of the training's size in the test.
"""

_base_ = ['segmentor.py']
find_unused_parameters = True  # norms of Swin's first stages, in several processes
auto_scale_lr = dict(enable=False, base_batch_size=16)
model = dict(
    data_preprocessor=dict(test_cfg=None),
    decode_head=dict(
        type='FCNHead', in_index=3, num_convs=0, concat_input=False, dropout_ratio=0.0
    ),
    test_cfg=dict(mode='slide'),
)
