"""Models as files: fused_file (save, load; plan_json is its plan), export (ONNX, torch.export), keras_* (from_keras).

Nothing here unpickles or evaluates what a file names.
"""
