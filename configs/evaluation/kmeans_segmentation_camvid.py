"""K-means of CamVid's validation tokens at 160x128 px, clusters matched to classes."""

_base_ = ['linear_segmentation_camvid.py']
protocol = dict(
    _delete_=True,
    type='KMeansSegmentation',
    classes={{_base_.protocol.classes}},
    ignore={{_base_.protocol.ignore}},
    size={{_base_.protocol.size}},
    restarts=5,
)
