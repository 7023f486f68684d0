"""gpuprep against what people use instead, disk to disk."""
