"""Quantization of JAX programs."""
