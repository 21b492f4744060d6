"""From a fine-tuning run to a bundle: weights, ONNX graphs and their check, the card, Triton."""
