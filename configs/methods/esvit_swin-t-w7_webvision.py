"""EsViT, Swin-T/7, WebVision-v1, 150 epochs, 8 x 64 images. Not yet run here."""

_base_ = ['esvit_swin-t-w7.py']
train_dataloader = dict(dataset=dict(data_root='data/webvision'))
train_cfg = dict(max_epochs=150)
