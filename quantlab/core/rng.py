"""Random keys by name: one key comes in, and every site folds its own."""

import hashlib

import jax
from jaxtyping import Array, Key


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
