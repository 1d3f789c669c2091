"""Products of a Hessian with a vector."""

import jax
import jax.numpy as jnp


def products(f, x):
  """Of f at x, (n,), a scalar, along cos(x): forward over reverse, reverse over
  reverse, reverse over forward.
  """
  g, along = jax.grad(f), jnp.cos(x)
  return (
    jax.jvp(g, (x,), (along,))[1],
    jax.grad(lambda x: jnp.vdot(g(x), along))(x),
    jax.grad(lambda x: jax.jvp(f, (x,), (along,))[1])(x),
  )
