"""Parts of gpuprep by themselves: kernels, stages, decoders, contours."""
