"""GLSD's demo with the matcher of mutual.py, whose folder must be on PYTHONPATH."""

_base_ = ['../../configs/quickstart/glsd_swin_demo.py']
custom_imports = dict(imports=['mutual'])
model = dict(heads=dict(region=dict(matching='MutualMatcher')))
