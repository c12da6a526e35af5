"""The parts of post-training quantization: ranges, where codes go, the ONNX file, and what each layer costs."""
