"""The front end for ONNX files, whoever made them: no deep-learning framework is needed."""
