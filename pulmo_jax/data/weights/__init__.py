"""Files of network weights: safetensors and PyTorch, and the pretrained weights that are downloaded."""
