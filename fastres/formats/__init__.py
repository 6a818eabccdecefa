"""Models as files.

fused_file saves and loads (plan_json is its plan, allowed what that may name), export writes ONNX
and torch.export, keras_* read Keras' files and check what was read. Nothing here unpickles or
evaluates what a file names.
"""
