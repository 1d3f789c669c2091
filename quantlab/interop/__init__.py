"""Adapters to other libraries' models and files."""

from quantlab.interop.nnx import from_nnx as from_nnx
