"""A trained model as one ONNX file of plain operators, with a JSON of all that prediction needs."""
