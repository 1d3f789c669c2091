"""Rotations of activations by small orthogonal factors."""

from quantlab_kernels.hadamard.api import hadamard as hadamard
