"""Measures of quality as pure functions of arrays."""

import jax
import jax.numpy as jnp
import numpy as np


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Whether the largest logit is the label's; logits (..., c), labels (...)."""
  return logits.argmax(-1) == labels


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """-log softmax(logits)[label] in nats; logits (..., c), labels (...)."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  picked = jnp.take_along_axis(log_p, labels[..., None].astype(int), axis=-1)
  return -picked[..., 0]


def agreement(reference: jax.Array, logits: jax.Array) -> jax.Array:
  """Whether both pick the same class; (..., c) each."""
  return reference.argmax(-1) == logits.argmax(-1)


def kl_divergence(reference: jax.Array, logits: jax.Array) -> jax.Array:
  """KL(softmax(reference) || softmax(logits)) in nats; (..., c) -> (...)."""
  log_p = jax.nn.log_softmax(reference.astype(jnp.float32))
  log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
  divergence = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
  # Never negative but for rounding.
  return jnp.maximum(divergence, 0)


def sqnr(reference: jax.Array, quantized: jax.Array) -> jax.Array:
  """Signal-to-quantization-noise ratio in dB; infinite when they are equal."""
  reference = reference.astype(jnp.float32)
  noise = jnp.square(reference - quantized.astype(jnp.float32)).sum()
  return 10 * jnp.log10(jnp.square(reference).sum() / noise)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  """Cosine of the angle between a and b over the last axis; 0 for a zero."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return (a * b).sum(-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


def ranks(x: np.ndarray) -> np.ndarray:
  """Ranks from 0, ties averaged."""
  _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
  last = np.cumsum(counts)
  return (last - (counts + 1) / 2)[where.reshape(-1)]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
  """Rank correlation with averaged ties; NaN where one of them is constant."""
  a, b = ranks(a), ranks(b)
  a, b = a - a.mean(), b - b.mean()
  norms = np.sqrt((a * a).sum() * (b * b).sum())
  return float((a * b).sum() / norms) if norms > 0 else float('nan')


def similarity_error(reference: np.ndarray, quantized: np.ndarray) -> float:
  """100 x RMS over pairs of (quantized cosine - float cosine)."""
  difference = np.asarray(quantized, np.float64) - np.asarray(reference)
  return float(100 * np.sqrt(np.square(difference).mean()))
