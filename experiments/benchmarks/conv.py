"""int8 convolutions of real models on the CPU beside XLA's float32.

Seconds are those of one compiled call, quantizing the images included. Arrays
past 32 MB are left out: there the system hands out each page anew, which takes
longer than any of these convolutions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import quantlab_kernels as kernels
from experiments.benchmarks import timing
from quantlab import runtime
from quantlab_kernels.int8_conv.specs import SPECS, Spec

CALLS = 2e-3  # seconds of calls in one measurement, at least


def run(config: Any) -> dict[str, Any]:
  """A case for each shape and batch; see `configs/bench/conv_cpu.py`."""
  cases = {}
  for name in config.shapes:
    for batch in config.batches:
      spec = SPECS[name]
      spec = spec._replace(x=(batch, *spec.x[1:]))
      if _largest(spec) <= config.most:
        cases[f'{name}/{batch}'] = _case(spec, config)
  return {'cases': cases, 'peers': {}}


def _options(spec: Spec) -> dict[str, Any]:
  return {
    'window_strides': spec.strides,
    'padding': spec.padding,
    'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'),
    'feature_group_count': spec.groups,
  }


def _largest(spec: Spec) -> int:
  """Bytes of the images, or of the result."""
  x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (spec.x, spec.w))
  f = functools.partial(lax.conv_general_dilated, **_options(spec))
  return 4 * max(x.size, jax.eval_shape(f, x, w).size)


def _case(spec: Spec, config: Any) -> dict[str, Any]:
  rng, batch = np.random.default_rng(config.seed), spec.x[0]
  x = jnp.asarray(rng.standard_normal(spec.x, np.float32))
  w = jnp.asarray(rng.standard_normal(spec.w, np.float32))
  codes = jnp.asarray(rng.integers(-127, 128, spec.w, np.int8))
  scale = jnp.full((spec.w[-1],), 1e-3, jnp.float32)
  options = _options(spec)

  def floats(x, w):
    return lax.conv_general_dilated(x, w, **options)

  def integers(name):
    def product(x, w, scale):
      q, s, _ = kernels.quantize_activation(x.reshape(batch, -1))
      q = q.reshape(x.shape)
      return kernels.int8_conv(
        q, w, x_scale=s, w_scale=scale, implementation=name, **options
      )

    return product

  made = {'float32': _calls(floats, x, w)}
  for name in config.implementations:
    made[f'w8a8 {name}'] = _calls(integers(name), x, codes, scale)
  repeats = max(each for _, each in made.values())
  samples = timing.interleaved(
    {name: {'run': _repeat(call, repeats)} for name, (call, _) in made.items()},
    config.rounds,
  )
  for clocks in samples.values():
    for stages in clocks.values():
      for stage, seconds in stages.items():
        stages[stage] = [s / repeats for s in seconds]
  best = f'w8a8 {config.implementations[0]}'
  return timing.case(samples, 'float32', {best: 1.0}, f'batch {batch}')


def _calls(f, *args):
  """The compiled call, and how many of them can be timed."""
  compiled = jax.jit(f).lower(*args).compile()

  def call():
    jax.block_until_ready(compiled(*args))

  call()
  with runtime.timed() as timer:
    call()
  return call, max(1, int(CALLS / max(timer.seconds, 1e-6)))


def _repeat(call, repeats):
  def run(_):
    for _ in range(repeats):
      call()

  return run
