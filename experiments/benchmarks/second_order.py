"""GPTQ of one layer beside PyTorch: seconds, and bytes of memory.

The peer is the same algorithm written for PyTorch as it is usually written: one
column at a time in Python, blocks of 128, act-order with static groups, the
Hessian's inverse by Cholesky factors. Both give the same loss.
"""

import importlib.metadata
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import quantlab as ql
from experiments.benchmarks import timing
from quantlab.ptq.second_order import second_order

BLOCK = 128
DAMP = 0.01


def run(config: Any) -> dict[str, Any]:
  """One case for each size, and what is known of the peer.

  Args:
    config: see `configs/bench/gptq.py`.
  """
  peer, found = _torch()
  cases = {}
  for size in config.sizes:
    w, h = _layer(size, config.seed)
    entries: dict[str, Any] = {}
    losses: dict[str, float] = {}
    entries['quantlab'], notes = _ours(w, h, config.group, losses)
    if peer is not None:
      entries['torch'] = _theirs(peer, w, h, config.group, losses)
    baseline = 'torch' if peer is not None else 'quantlab'
    limits = {} if peer is None else {'quantlab': config.limit}
    samples = timing.interleaved(entries, config.rounds)
    case = timing.case(
      samples,
      baseline,
      limits,
      f'{size} x {size}, int4 in groups of {config.group}, asymmetric, '
      'act-order; compiled before',
    )
    case |= {'loss': losses, 'bytes': notes}
    if len(losses) > 1:
      a, b = losses.values()
      found['fair'] = bool(abs(a - b) <= 1e-2 * abs(b))
    cases[f'gptq/{size}'] = case
  return {'cases': cases, 'peers': {'torch': found}}


def _layer(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """A weight, and the Hessian of inputs of unequal size."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(2 * size, size)) * np.exp(rng.normal(size=size) / 2)
  x = x.astype(np.float32)
  return rng.normal(size=(size, size)).astype(np.float32), x.T @ x / len(x)


def _ours(w, h, group, losses):
  quantizer = ql.int4(group=group, symmetric=False)
  w, h = jnp.asarray(w), jnp.asarray(h)
  compiled = (
    jax.jit(lambda w, h: second_order(w, h, quantizer, act_order=True))
    .lower(w, h)
    .compile()
  )

  def stage(_):
    out = jax.block_until_ready(compiled(w, h))
    losses['quantlab'] = float(out.loss)

  memory = compiled.memory_analysis()
  sizes = {
    name: getattr(memory, f'{name}_size_in_bytes')
    for name in ('argument', 'output', 'temp')
  }
  return {'gptq': stage}, {'quantlab': sizes | {'peak': sum(sizes.values())}}


def _torch():
  try:
    import torch
  except ImportError as error:
    why = f"not compared: {error}; pip install 'quantlab[bench]'"
    return None, {'used': False, 'fair': None, 'version': None, 'why': why}
  torch.set_num_threads(os.cpu_count() or 1)
  return torch, {
    'used': True,
    'fair': True,
    'version': importlib.metadata.version('torch'),
    'why': 'the same algorithm, Hessian, order, groups and dtype',
  }


def _theirs(torch, w, h, group, losses):
  w, h = torch.from_numpy(w), torch.from_numpy(h)

  def stage(_):
    losses['torch'] = _gptq(torch, w, h, group)

  return {'gptq': stage}


def _gptq(torch, weight, hessian, group: int) -> float:
  """GPTQ with rows of outputs (N, K); returns sum e^2 / 2."""
  w, h, k = weight.T.contiguous(), hessian.clone(), hessian.shape[0]
  parts = w.reshape(w.shape[0], -1, group)
  low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
  scale = (high - low) / 15
  zero = torch.round(-low / scale)
  order = torch.argsort(torch.diag(h), descending=True)
  w, h = w[:, order], h[order][:, order]
  h += DAMP * torch.mean(torch.diag(h)) * torch.eye(k)
  inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
  upper = torch.linalg.cholesky(inverse, upper=True)
  rounded, loss = torch.zeros_like(w), 0.0
  for start in range(0, k, BLOCK):
    end = min(start + BLOCK, k)
    part, local = w[:, start:end].clone(), upper[start:end, start:end]
    errors = torch.zeros_like(part)
    for i in range(end - start):
      g = order[start + i] // group
      s, z = scale[:, g], zero[:, g]
      column = part[:, i]
      q = s * (torch.clamp(torch.round(column / s) + z, 0, 15) - z)
      error = (column - q) / local[i, i]
      part[:, i:] -= error[:, None] @ local[i, i:][None]
      rounded[:, start + i], errors[:, i] = q, error
    loss += float((errors**2).sum() / 2)
    w[:, end:] -= errors @ upper[start:end, end:]
  return loss
