"""K-means of validation tokens at 448 px, clusters matched to the classes of VOC 2012."""

_base_ = ['linear_segmentation_voc.py']
protocol = dict(
    _delete_=True,
    type='KMeansSegmentation',
    classes={{_base_.protocol.classes}},
    size=448,
    num_clusters=None,  # as many as classes
    restarts=5,
)
