r"""Low-bit products on the CPU beside float32, onnxruntime, PyTorch and ggml.

  pip install -e '.[bench,llama]'
  python -m experiments.bench --config=configs/bench/matmul_cpu.py \
    --workdir=runs/matmul_cpu

`--config=configs/bench/matmul_cpu.py:sites` takes the products of MiniLM and
of a Llama of the 1B class instead. Ratios are seconds over those of XLA's
float32 product; limits are what the kernels are held to.
"""

from ml_collections import config_dict

PRODUCTS = ('float32', 'bfloat16', 'w8a8', 'w4a8', 'ternary')
# Times as fast as float32, by product and rows.
AT_LEAST = {
  'w8a8': {'1': 4.2, '16': 6.0, '256': 4.1},
  'w4a8': {'1': 8.0, '16': 7.0, '256': 3.8},
  'ternary': {'1': 16.0, '16': 10.0, '256': 4.5},
}


def _shape(k, n, rows, products=PRODUCTS, peers=False, at_least=None):
  return {
    'k': k,
    'n': n,
    'rows': rows,
    'products': products,
    'peers': peers,
    'at_least': at_least or {},
  }


def large():
  """The shapes that the kernels are tuned on."""
  return (
    _shape(4096, 4096, (1, 16, 256), peers=True, at_least=AT_LEAST),
    _shape(4096, 11008, (1,)),
    _shape(8192, 8192, (1,)),
  )


def sites():
  """Products of real models, at five batch sizes."""
  rows = (1, 4, 16, 64, 256)
  products = ('float32', 'w8a8', 'w4a8', 'ternary')
  even = {p: {str(m): 1.0 for m in rows} for p in products[1:]}
  sizes = (
    *((384, 384), (384, 1536), (1536, 384)),  # MiniLM
    *((2048, 512), (2048, 2048), (2048, 8192), (8192, 2048)),  # Llama 1B
  )
  return tuple(
    _shape(k, n, rows, products, at_least=even if k * n >= 2**20 else {})
    for k, n in sizes
  )


def get_config(which: str = 'large') -> config_dict.ConfigDict:
  """The large shapes, or the sites of real models."""
  chosen = {'large': large, 'sites': sites}
  if which not in chosen:
    raise ValueError(f'unknown shapes {which!r}; known: {sorted(chosen)}')
  return config_dict.ConfigDict(
    {
      'benchmark': 'matmul',
      'seed': 0,
      'shapes': chosen[which](),
      'rotate': 2**28,  # bytes of weights, past the caches
      'rounds': 15,
      'peers': ('onnxruntime', 'torch', 'ggml', 'ggml_k')
      if which == 'large'
      else (),
    }
  )
