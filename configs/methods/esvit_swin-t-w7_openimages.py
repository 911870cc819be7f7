"""EsViT, Swin-T/7, OpenImages-v4, 50 epochs, 8 x 64 images. Not yet run here."""

_base_ = ['esvit_swin-t-w7.py']
train_dataloader = dict(dataset=dict(data_root='data/openimages/train'))
train_cfg = dict(max_epochs=50)
