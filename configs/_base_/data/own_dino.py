"""Pictures of one's own, 2 x 224 + 8 x 96 with DINO's crop scales; epochs of 10,000.

An epoch shows as many whatever the folder holds, so that a recipe's epochs are of one
length.
"""

_base_ = ['imagenet_dino.py']
train_dataloader = dict(
    sampler=dict(length=10000), dataset=dict(data_root='data/pictures')
)
