"""Export checkpoints to ONNX and TensorRT."""
