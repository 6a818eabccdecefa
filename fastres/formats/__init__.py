"""Models as files.

fused_file saves and loads (plan_json is its plan, of what allowed lists), export writes ONNX and torch.export, keras_*
read Keras' files and check what was read. Nothing here unpickles or evaluates what a file names.
"""
