"""A training step traced once, compiled, and on a GPU recorded as a CUDA graph."""
