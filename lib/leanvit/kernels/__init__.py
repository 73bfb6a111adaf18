"""Kernels: torch ops with a reference, a CPU path and a CUDA source. They know torch and CuPy alone."""
