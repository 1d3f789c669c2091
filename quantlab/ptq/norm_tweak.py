"""Norm tweaking (arXiv 2309.02784)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from quantlab.ptq.transform import Tuner, Tuning


def norm_tweak(
  learning_rate: float = 1e-3, *, depth_scale: float = 1.0, epochs: int = 1
) -> Tuner:
  """Tunes norm gains and biases of each block, its weights frozen as codes.

  Adam on the distance of the block's output channels (section 3.2),

    L = 1/C sum_c |mu_c - mu_q,c| + |var_c - var_q,c|,

  over tokens, between the float stream and the quantized block. One gentle
  pass helps; several hard ones hurt (the paper's finding, and ours).

  Args:
    learning_rate: of the first block.
    depth_scale: the last block's is (1 + depth_scale) times as large.
    epochs: passes over the calibration batches.
  """

  def run(block: Tuning) -> dict[str, Any]:
    if not block.gains:
      return {}
    rate = learning_rate * (1 + depth_scale * block.depth)
    adam = optax.adam(rate)
    leaves = dict(block.leaves)
    gains = {path: leaves[path] for path in block.gains}
    state = adam.init(gains)

    @jax.jit
    def step(gains, state, leaves, stream, context, target):
      def loss(gains):
        out = block.apply({**leaves, **gains}, stream, context)
        return channel_distance(target[0], out[0])

      value, gradient = jax.value_and_grad(loss)(gains)
      updates, state = adam.update(gradient, state, gains)
      return optax.apply_updates(gains, updates), state, value

    losses = []
    for _ in range(epochs):
      for stream, context, target in block.batches:
        gains, state, value = step(
          gains, state, leaves, stream, context, target
        )
        losses.append(float(value))
    for path, value in gains.items():
      block.set_leaf(path, value)
    return {'loss': losses}

  options = {
    'learning_rate': learning_rate,
    'depth_scale': depth_scale,
    'epochs': epochs,
  }
  return Tuner('norm_tweak', run, options)


def channel_distance(a: jax.Array, b: jax.Array) -> jax.Array:
  """Mean over channels (last axis) of |mean difference| + |var difference|."""
  a, b = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (a, b))
  mean = jnp.abs(a.mean(0) - b.mean(0))
  var = jnp.abs(a.var(0) - b.var(0))
  return jnp.mean(mean + var)
