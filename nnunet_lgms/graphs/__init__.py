"""CUDA graphs: the network's, the training step's and the update's of the weights, with what keeps the GPU busy."""
