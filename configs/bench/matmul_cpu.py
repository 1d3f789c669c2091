r"""Low-bit products on the CPU beside float32, onnxruntime, PyTorch and ggml.

  pip install -e '.[bench,llama]'
  python -m experiments.bench --config=configs/bench/matmul_cpu.py \
    --workdir=runs/matmul_cpu

`--config=configs/bench/matmul_cpu.py:sites` takes the products of MiniLM and
of a Llama of the 1B class instead, `:small` squares around the size from which
low bits pay (see `experiments.benchmarks.crossover`). Ratios are seconds over
those of XLA's float32 product; limits are what the kernels are held to.
"""

from ml_collections import config_dict

# Low-bit products, with weights as they are stored and packed ahead.
LOW_BITS = tuple(
  name + ahead
  for name in ('w8a8', 'w4a8', 'ternary')
  for ahead in ('', '_prepacked')
)
PRODUCTS = ('float32', 'bfloat16', *LOW_BITS)
# Times as fast as float32, by rows.
_W8A8 = {'1': 4.2, '16': 6.0, '256': 4.1}
_W4A8 = {'1': 8.0, '16': 7.0, '256': 3.8}
_TERNARY = {'1': 16.0, '16': 10.0, '256': 4.5}
AT_LEAST = {
  'w8a8': _W8A8,
  'w8a8_prepacked': _W8A8,
  'w4a8': _W4A8,
  'w4a8_prepacked': _W4A8,
  'ternary': _TERNARY,
  'ternary_prepacked': _TERNARY,
}


# Rows of the tables over sites.
ROWS = (1, 4, 16, 64, 256)


def _shape(k, n, rows, products=PRODUCTS, peers=False, at_least=None, calls=1):
  return {
    'k': k,
    'n': n,
    'rows': rows,
    'calls': calls,
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
  products = ('float32', *LOW_BITS)
  even = {p: {str(m): 1.0 for m in ROWS} for p in products[1:]}
  sizes = (
    *((384, 384), (384, 1536), (1536, 384)),  # MiniLM
    *((2048, 512), (2048, 2048), (2048, 8192), (8192, 2048)),  # Llama 1B
  )
  return tuple(
    _shape(k, n, ROWS, products, at_least=even if k * n >= 2**20 else {})
    for k, n in sizes
  )


def small():
  """Where the cost of a call is that of the product."""
  products = ('float32', 'w8a8', 'w4a8', 'ternary', 'w4a16')
  sides = (16, 32, 64, 128, 256, 512, 1024)
  return tuple(_shape(k, k, ROWS, products, calls=8) for k in sides)


def get_config(which: str = 'large') -> config_dict.ConfigDict:
  """The large shapes, the sites of real models, or small ones."""
  chosen = {'large': large, 'sites': sites, 'small': small}
  many = which == 'large'
  if which not in chosen:
    raise ValueError(f'unknown shapes {which!r}; known: {sorted(chosen)}')
  return config_dict.ConfigDict(
    {
      'benchmark': 'matmul',
      'seed': 0,
      'seconds': 0.06,  # of one measurement, at least
      'shapes': chosen[which](),
      # Bytes of weights, past the caches, in at most so many.
      'rotate': 2**28 if many else 2**27,
      'copies': 2**10 if many else 8,
      # Before each measurement; but small products are measured in caches.
      'read_before': which != 'small',
      'rounds': {'large': 15, 'sites': 5, 'small': 7}[which],
      'peers': ('onnxruntime', 'torch', 'ggml', 'ggml_k') if many else (),
    }
  )
