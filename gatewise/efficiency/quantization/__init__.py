"""The parts of post-training quantization: ranges, placement of codes, the ONNX file, and sensitivity of layers."""
