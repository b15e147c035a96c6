"""TensorRT engines: build, check and run."""
