"""Low-bit products on the CPU beside float and beside other engines.

What is measured is what one decode or prefill step does: R weights, together
larger than the caches, are multiplied one after the other in one compiled call.
Seconds are those of one product, quantizing its activations included.
"""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import quantlab_kernels as kernels
from experiments.benchmarks import engines, floors, timing

CALLS = 2000  # of the measurement of a call's own cost


def run(config: Any) -> dict[str, Any]:
  """A case for each shape and number of rows; floors and peers of the run.

  Args:
    config: see `configs/bench/matmul_cpu.py`.
  """
  memory = floors.Memory(config.rotate)
  machine = memory.measure()
  peers = engines.available(config.peers)
  cases: dict[str, Any] = {}
  for shape in config.shapes:
    made = _contestants(shape, config, peers)
    for m in shape['rows']:
      cases[f'{shape["k"]}x{shape["n"]}/{m}'] = _case(
        shape, m, config, made, machine, memory
      )
    del made  # a gigabyte or two
  cases['call'] = _overhead(config.rounds)
  about = {name: e.about for name, e in peers.items()}
  return {'cases': cases, 'floors': machine, 'peers': about}


def _contestants(shape, config, peers) -> dict[str, engines.ByRows]:
  rng = np.random.default_rng(config.seed)
  size = shape['k'], shape['n'], config.rotate, rng
  most = config.copies
  made = {name: engines.ours(name, *size, most) for name in shape['products']}
  for name, engine in peers.items() if shape['peers'] else ():
    for product, make in engine.formats.items():
      if product in made:
        made[f'{product} {name}'] = make(*size)
  return made


def _case(shape, m, config, made, machine, memory) -> dict[str, Any]:
  entries = {name: each(m) for name, each in made.items()}
  # Short runs are repeated: what wakes cores and threads is not measured.
  calls = {
    name: max(shape['calls'], math.ceil(config.seconds / _seconds(entry)))
    for name, entry in entries.items()
  }
  # Threads of other engines spin before they go to sleep.
  pause = 0.02 if shape['peers'] else 0.002

  def before():
    time.sleep(pause)
    # A core that was idle is slow for some milliseconds, in which half of a
    # short run would fall and little of a long one. So all of them wake first,
    # by reading what no product uses; that empties the caches, too.
    if config.read_before:
      memory.read()

  samples = timing.interleaved(
    {
      name: {'run': _times(entry.run, calls[name])}
      for name, entry in entries.items()
    },
    config.rounds,
    before=before,
  )
  for name, entry in entries.items():
    for stages in samples[name].values():
      for stage, seconds in stages.items():
        stages[stage] = [s / entry.repeats / calls[name] for s in seconds]
  limits = {
    name: 1 / wanted[str(m)]
    for name, wanted in shape['at_least'].items()
    if str(m) in wanted
  }
  case = timing.case(samples, 'float32', limits, f'{m} rows')
  median = {k: v['wall']['total']['median'] for k, v in case['seconds'].items()}
  case['of_bandwidth'] = {
    k: e.nbytes / median[k] / machine['bytes_per_second']
    for k, e in entries.items()
  }
  operations = 2 * m * shape['k'] * shape['n']
  case['of_int8_peak'] = {
    k: operations / s / machine['int8_operations_per_second']
    for k, s in median.items()
  }
  case['times_best_peer'] = _against_peers(samples)
  return case


def _seconds(entry: engines.Contestant) -> float:
  """Of one run, the caches and the compiler warm."""
  entry.run(4)  # weights that are used so often move into large pages
  begin = time.perf_counter()
  entry.run(1)
  return time.perf_counter() - begin


def _times(run, calls: int):
  return lambda _: run(calls)


def _against_peers(samples) -> dict[str, Any]:
  """How many times faster than the fastest peer at the same bits."""
  found: dict[str, Any] = {}
  for name in samples:
    same = name.removesuffix('_prepacked')  # others pack theirs, too
    rivals = [s for s in samples if s.startswith(f'{same} ')]
    if not rivals:
      continue
    ours = samples[name]['wall']['total']
    ratios = {
      rival: timing.spread(
        [
          b / a
          for a, b in zip(ours, samples[rival]['wall']['total'], strict=True)
        ]
      )
      for rival in rivals
    }
    best = min(ratios, key=lambda r: ratios[r]['median'])
    found[name] = {'peer': best, **ratios[best]}
  return found


def _overhead(rounds: int) -> dict[str, Any]:
  """Seconds of one small call beside one that does nothing."""
  x, w = jnp.ones((1, 64), jnp.int8), jnp.ones((64, 64), jnp.int8)
  empty = jax.jit(lambda x, w: x).lower(x, w).compile()
  small = (
    jax.jit(lambda x, w: kernels.int8_matmul(x, w, out_dtype=jnp.int32))
    .lower(x, w)
    .compile()
  )

  def loop(call):
    def run(_):
      for _ in range(CALLS):
        jax.block_until_ready(call(x, w))

    return run

  contestants = {'empty': {'run': loop(empty)}, 'int8': {'run': loop(small)}}
  samples = timing.interleaved(contestants, rounds)
  for clocks in samples.values():
    for stages in clocks.values():
      for stage, seconds in stages.items():
        stages[stage] = [s / CALLS for s in seconds]
  case = timing.case(samples, 'empty', {}, 'int8 product of 1 x 64 x 64')
  medians = {
    k: v['wall']['total']['median'] for k, v in case['seconds'].items()
  }
  case['microseconds_over_empty'] = 1e6 * (medians['int8'] - medians['empty'])
  return case
