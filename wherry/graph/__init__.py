"""Graph models: an ONNX file as a checkpoint, made plain, edited, checked; what several formats and an engine share."""
