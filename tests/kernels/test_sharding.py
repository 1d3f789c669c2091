"""Sharded operands under plain jit: partitioned, right, never gathered."""

import os
import subprocess
import sys

PROGRAM = """
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
import numpy as np
import quantlab_kernels as qk
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()).reshape(4), ('d',))
rng = np.random.default_rng(0)
x = rng.integers(-128, 128, (8, 1024)).astype(np.int8)
w = rng.integers(-128, 128, (1024, 1024)).astype(np.int8)
p = qk.pack(w.view(np.uint8), 4)
s = np.ones((8, 1024), np.float32)
v = (w.astype(np.int64) + 8) % 16 - 8
c = rng.integers(-128, 128, (8, 6, 6, 8)).astype(np.int8)
f = rng.integers(-128, 128, (3, 3, 8, 8)).astype(np.int8)
conv = lambda c, f: qk.int8_conv(
  c, f, window_strides=(1, 1), padding='SAME',
  dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
products = {
  'int8': (qk.int8_matmul, (x, w), x.astype(np.int64) @ w,
           [(P('d'), P()), (P(), P(None, 'd')), (P(None, 'd'), P('d'))]),
  'w4a8': (lambda x, p, s: qk.w4a8_matmul(x, p, s, group=128), (x, p, s),
           x.astype(np.int64) @ v,
           [(P('d'), P(), P()), (P(), P(None, 'd'), P(None, 'd')),
            (P(None, 'd'), P('d'), P('d'))]),
  'conv': (conv, (c, f), conv(c, f),
           [(P('d'), P()), (P(), P(None, None, None, 'd'))]),
}
for name, (op, args, want, specs) in products.items():
  for spec in specs:
    put = [jax.device_put(a, NamedSharding(mesh, t))
           for a, t in zip(args, spec, strict=True)]
    run = jax.jit(op).lower(*put).compile()
    np.testing.assert_array_equal(run(*put), want)
    assert 'all-gather' not in run.as_text(), (name, spec)
    print('ok', name, spec)
"""


def test_four_devices():
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM],
    env=env,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.count('ok') == 8
