"""The cpu backend: C++17 kernels that XLA calls on its own threads.

`source/` holds the kernels, `build` compiles them on first use, `library`
loads them and says why it cannot, `product` makes them JAX functions.
"""
