"""Random keys by name: one key comes in, and every site folds its own."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key


def check_key(key: Any) -> None:
  """Refuses what is no single typed random key; None passes.

  Raises:
    TypeError: says what was found.
  """
  if key is not None and not (is_key(key) and key.shape == ()):
    raise TypeError(
      f'key= takes one random key, got {key!r}; pass jax.random.key(seed)'
    )


def is_key(x: Any) -> bool:
  """Whether something is an array of typed random keys."""
  dtype = getattr(x, 'dtype', None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def fold_in_name(key: Key[Array, ''], name: str) -> Key[Array, '']:
  """The key of a named thing: independent of order and of its neighbours.

  Folds in 64 bits of SHA-256(name), not Python's `hash`, which differs from
  one process to the next. Adding a site or renaming another leaves this key
  as it was.

  Args:
    key: a scalar key.
    name: a site id, a parameter path, a model's name.

  Returns:
    A scalar key.
  """
  digest = hashlib.sha256(name.encode('utf-8')).digest()
  for i in (0, 4):  # fold_in takes 32 bits at a time
    key = jax.random.fold_in(key, int.from_bytes(digest[i : i + 4], 'big'))
  return key
