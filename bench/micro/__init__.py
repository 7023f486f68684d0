"""Benchmarks of parts of gpuprep: GPU kernels, compiled loops, decoders, contours, report."""
