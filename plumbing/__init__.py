"""What a training tool needs and LLM-JEPA is not about: devices, files, kernels, plots, ..."""
