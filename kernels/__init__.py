"""The formulas of model.py again, fast: tiles for CPU and CUDA, Triton, and the chunked loss."""
