"""Our ResNets: resnet (modules), registry (names), weights and pretrained (published files), checkpoint (safetensors), preprocess, features, digits, classify, summary.

Each network is a runtime.live.LiveModule.
"""
