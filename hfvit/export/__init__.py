"""A checkpoint -> ONNX files that are checked before they get their names."""
