"""Which way of training fits a model on this machine: from its size and the GPUs' memory, before anything is loaded."""

LARGE = 10**9  # parameters from which on blocks are compiled on a GPU and the trained model is kept packed
