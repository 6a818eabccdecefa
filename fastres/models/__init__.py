"""Our ResNets.

resnet holds the modules, registry their names, weights and pretrained the published files,
checkpoint reads and writes state dicts; preprocess, features, digits, classify and summary are
what goes with them. Each network is a runtime.live.LiveModule.
"""
