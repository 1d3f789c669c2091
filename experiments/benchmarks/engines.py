"""Matrix products of this library, of XLA and of other engines, to be timed.

A contestant multiplies x by R weights one after the other, again and again.
"""

import functools
import importlib.metadata
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import quantlab_kernels as kernels
from experiments.benchmarks import ggml

GROUP = 128  # of weights with four bits and fewer
# A contestant for each number of rows.
ByRows = Callable[[int], 'Contestant']


class Contestant(NamedTuple):
  """One engine with its weights.

  Attributes:
    run: all R products, as often as it is told.
    repeats: R.
    nbytes: of one weight, scales included.
  """

  run: Callable[[int], Any]
  repeats: int
  nbytes: int


class Engine(NamedTuple):
  """What another library multiplies.

  Attributes:
    about: version, and what was measured or why nothing was.
    formats: by the name of our product at the same bits, a function of
      (k, n, bytes to rotate through, generator of random numbers).
  """

  about: dict[str, Any]
  formats: Mapping[str, Callable[..., ByRows]]


def copies(nbytes: int, rotate: int, most: int | None = None) -> int:
  """Weights that are together past the caches, or at most so many."""
  return max(2, min(math.ceil(rotate / nbytes), most or sys.maxsize))


def _repeated(run: Callable[[], Any]) -> Callable[[int], Any]:
  return lambda times: [run() for _ in range(times)]


def rows(rng: np.random.Generator, m: int, k: int) -> np.ndarray:
  return rng.standard_normal((m, k), np.float32)


# Products of this library, and XLA's own in float.


def _a8(x):
  q, scale, _ = kernels.quantize_activation(x)
  return q, scale


def _int8(x, w):
  q, scale = _a8(x)
  return kernels.int8_matmul(q, w[0], w_scale=w[1], x_scale=scale)


def _packed(bits: int):
  def product(x, w):
    q, scale = _a8(x)
    group = _group(x.shape[1], bits)
    return kernels.w4a8_matmul(
      q, w[0], w[1], bits=bits, group=group, x_scale=scale
    )

  return product


def _w4a16(x, w):
  group = _group(x.shape[1], 4)
  return kernels.w4a16_matmul(x, w[0], w[1], bits=4, group=group)


def _group(k: int, bits: int) -> int:
  return min(GROUP, k) if bits > 2 else k


def _random_packed(rng, k, n, bits):
  groups = k // _group(k, bits)
  scale = np.full((groups, n), k**-0.5, np.float32)
  if bits == 2:  # codes -1, 0, 1
    codes = rng.integers(-1, 2, (k // 4, 4, n), np.int8).view(np.uint8) & 3
    packed = codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4
    return (packed | codes[:, 3] << 6).astype(np.uint8), scale
  return rng.integers(0, 256, (k * bits // 8, n), np.uint8), scale


def _random_int8(rng, k, n):
  codes = rng.integers(-127, 128, (k, n), np.int8)
  return codes, np.full((1, n), k**-0.5 / 127, np.float32)


def _prepacked(make):
  def weight(rng, k, n):
    codes, scale = make(rng, k, n)
    return kernels.prepack(codes), scale

  return weight


def _codes(bits: int):
  return lambda rng, k, n: _random_packed(rng, k, n, bits)


PRODUCTS: dict[str, tuple[Callable, Callable]] = {
  'float32': (
    lambda rng, k, n: rows(rng, k, n) * np.float32(k**-0.5),
    lambda x, w: x @ w,
  ),
  'bfloat16': (
    lambda rng, k, n: jnp.asarray(rows(rng, k, n) * k**-0.5, jnp.bfloat16),
    lambda x, w: jnp.dot(
      x.astype(jnp.bfloat16), w, preferred_element_type=jnp.float32
    ),
  ),
  'w8a8': (_random_int8, _int8),
  'w8a8_prepacked': (_prepacked(_random_int8), _int8),
  'w4a8': (_codes(4), _packed(4)),
  'w4a8_prepacked': (_prepacked(_codes(4)), _packed(4)),
  'ternary': (_codes(2), _packed(2)),
  'ternary_prepacked': (_prepacked(_codes(2)), _packed(2)),
  'w4a16': (_codes(4), _w4a16),
}


def ours(
  name: str, k: int, n: int, rotate: int, rng, most: int | None = None
) -> ByRows:
  """A product of `PRODUCTS`, chained in one jitted call."""
  make, product = PRODUCTS[name]
  first = jax.tree.map(jnp.asarray, make(rng, k, n))
  nbytes = sum(a.nbytes for a in jax.tree.leaves(first))
  count = copies(nbytes, rotate, most)
  # In memory of their own; what they hold makes no difference.
  weights = [jax.tree.map(jnp.copy, first) for _ in range(count)]

  @jax.jit
  def chain(x, weights):
    y = None
    for w in weights:
      y = product(x, w)
      # Each waits for the one before, by one element, in place: read here
      # too, it would be copied with all of x.
      first = 1 + 1e-30 * y[:1, :1]
      x = jax.lax.dynamic_update_slice(x, first, (0, 0))
    return y

  def by_rows(m: int) -> Contestant:
    x = jnp.asarray(rows(rng, m, k))
    return Contestant(
      _repeated(lambda: jax.block_until_ready(chain(x, weights))),
      len(weights),
      nbytes,
    )

  return by_rows


# Other engines.


def available(names) -> dict[str, Engine]:
  """The engines that a config names, with why one is absent."""
  return {name: ENGINES[name]() for name in names}


def _absent(package: str, error: Exception) -> Engine:
  why = f"not compared: {error}; pip install 'quantlab[bench]'"
  return Engine({'version': None, 'why': why, 'package': package}, {})


def onnxruntime() -> Engine:
  """MatMulInteger with dynamic activations; MatMulNBits in int8 arithmetic."""
  try:
    import onnx  # noqa: F401
    import onnxruntime
  except ImportError as error:
    return _absent('onnxruntime', error)
  about = {
    'version': onnxruntime.__version__,
    'why': 'MatMulInteger after DynamicQuantizeLinear; MatMulNBits in blocks '
    'of 128 with accuracy level 4 (int8 activations), 4 and 2 bits',
  }
  return Engine(
    about,
    {
      'w8a8': lambda *a: _onnx(_onnx_int8, *a),
      'w4a8': lambda *a: _onnx(_onnx_bits(4), *a),
      'ternary': lambda *a: _onnx(_onnx_bits(2), *a),
    },
  )


def _onnx(add: Callable, k: int, n: int, rotate: int, rng) -> ByRows:
  """One session of R products of the same rows."""
  import onnxruntime as ort
  from onnx import TensorProto, helper

  nodes: list[Any] = []
  weights: list[Any] = []
  nbytes = add(nodes, weights, 0, k, n, rng)
  count = copies(nbytes, rotate)
  for i in range(1, count):
    add(nodes, weights, i, k, n, rng)
  value = helper.make_tensor_value_info
  graph = helper.make_graph(
    nodes,
    'products',
    [value('x', TensorProto.FLOAT, ['m', k])],
    [value(f'y{i}', TensorProto.FLOAT, ['m', n]) for i in range(count)],
    weights,
  )
  domains = [helper.make_opsetid(*d) for d in (('', 17), ('com.microsoft', 1))]
  model = helper.make_model(graph, opset_imports=domains, ir_version=9)
  options = ort.SessionOptions()
  options.intra_op_num_threads = os.cpu_count() or 1
  session = ort.InferenceSession(
    model.SerializeToString(), options, providers=['CPUExecutionProvider']
  )

  def by_rows(m: int) -> Contestant:
    x = rows(rng, m, k)
    return Contestant(
      _repeated(lambda: session.run(None, {'x': x})), count, nbytes
    )

  return by_rows


def _onnx_int8(nodes, weights, i, k, n, rng) -> int:
  from onnx import helper, numpy_helper

  w = rng.integers(-127, 128, (k, n), np.int8)
  scale = np.full((n,), k**-0.5 / 127, np.float32)
  weights += [
    numpy_helper.from_array(w, f'w{i}'),
    numpy_helper.from_array(scale, f's{i}'),
  ]
  nodes += [
    helper.make_node(op, ins, outs)
    for op, ins, outs in (
      ('DynamicQuantizeLinear', ['x'], [f'q{i}', f'xs{i}', f'xz{i}']),
      ('MatMulInteger', [f'q{i}', f'w{i}', f'xz{i}'], [f'a{i}']),
    )
  ]
  nodes += [
    helper.make_node('Cast', [f'a{i}'], [f'f{i}'], to=1),
    helper.make_node('Mul', [f's{i}', f'xs{i}'], [f't{i}']),
    helper.make_node('Mul', [f'f{i}', f't{i}'], [f'y{i}']),
  ]
  return w.nbytes + scale.nbytes


def _onnx_bits(bits: int) -> Callable:
  def add(nodes, weights, i, k, n, rng) -> int:
    from onnx import helper, numpy_helper

    w = rng.integers(0, 256, (n, k // GROUP, GROUP * bits // 8), np.uint8)
    scale = np.full((n, k // GROUP), k**-0.5, np.float32)
    weights.extend(
      (
        numpy_helper.from_array(w, f'w{i}'),
        numpy_helper.from_array(scale, f's{i}'),
      )
    )
    nodes.append(
      helper.make_node(
        'MatMulNBits',
        ['x', f'w{i}', f's{i}'],
        [f'y{i}'],
        domain='com.microsoft',
        K=k,
        N=n,
        bits=bits,
        block_size=GROUP,
        accuracy_level=4,
      )
    )
    return w.nbytes + scale.nbytes

  return add


def torch() -> Engine:
  """Dynamic int8 linear layers; int4 weights with bfloat16 activations."""
  try:
    import torch
  except ImportError as error:
    return _absent('torch', error)
  torch.set_num_threads(os.cpu_count() or 1)
  about = {
    'version': importlib.metadata.version('torch'),
    'why': 'dynamic int8 Linear; _weight_int4pack_mm_for_cpu in groups of 128 '
    'with bfloat16 activations',
  }
  formats = {'w4a8': lambda *a: _torch(torch, _torch_int4, *a)}
  if hasattr(torch.ops, 'quantized'):
    formats['w8a8'] = lambda *a: _torch(torch, _torch_int8, *a)
  return Engine(about, formats)


def _torch(torch, make: Callable, k: int, n: int, rotate: int, rng) -> ByRows:
  first, nbytes, dtype = make(torch, k, n, rng)
  count = copies(nbytes, rotate)
  products = [first, *(make(torch, k, n, rng)[0] for _ in range(1, count))]

  def by_rows(m: int) -> Contestant:
    x = torch.from_numpy(rows(rng, m, k)).to(dtype)

    def run():
      with torch.inference_mode():
        return [product(x) for product in products]

    return Contestant(_repeated(run), count, nbytes)

  return by_rows


def _torch_int8(torch, k, n, rng):
  layer = torch.nn.Linear(k, n, bias=False)
  layer.weight.data = torch.from_numpy(rows(rng, n, k) * np.float32(k**-0.5))
  quantized = torch.ao.quantization.quantize_dynamic(
    torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8
  )
  return quantized, k * n + 4 * n, torch.float32


def _torch_int4(torch, k, n, rng):
  codes = torch.from_numpy(rng.integers(0, 16, (n, k), np.int32))
  packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
  scales = torch.full((k // GROUP, n, 2), k**-0.5, dtype=torch.bfloat16)

  def product(x):
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)

  return product, k * n // 2 + scales.nbytes, torch.bfloat16


def _ggml_engine(formats: Mapping[str, str]) -> Engine:
  """Formats of ggml by the product at the same bits."""
  try:
    ggml.load()
    version = importlib.metadata.version('llama-cpp-python')
  except ImportError as error:
    why = f"not compared: {error}; pip install 'quantlab[llama]'"
    return Engine({'version': None, 'why': why, 'package': 'ggml'}, {})
  kinds = ', '.join(formats.values())
  why = f'{kinds} of llama-cpp-python, not packed again'
  return Engine(
    {'version': version, 'why': why},
    {name: functools.partial(_ggml, kind) for name, kind in formats.items()},
  )


def _ggml(kind: str, k: int, n: int, rotate: int, rng) -> ByRows:
  def by_rows(m: int) -> Contestant:
    count = copies(k * n // 2, rotate)
    made = ggml.Products(kind, k, n, m, count, rng)
    return Contestant(_repeated(made), count, made.nbytes)

  return by_rows


ENGINES: dict[str, Callable[[], Engine]] = {
  'onnxruntime': onnxruntime,
  'torch': torch,
  'ggml': lambda: _ggml_engine(
    {'w8a8': 'Q8_0', 'w4a8': 'Q4_0', 'ternary': 'TQ2_0'}
  ),
  'ggml_k': lambda: _ggml_engine({'w4a8': 'Q4_K'}),
}
