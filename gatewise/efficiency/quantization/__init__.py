"""The parts of post-training quantisation: ranges, where codes go, the ONNX file, and what each layer costs."""
