"""A multilayer perceptron in NNX, whose layers are objects, not functions.

`quantlab.interop.from_nnx` makes the pure function and parameters of it.
"""

import jax
from flax import nnx


class Mlp(nnx.Module):
  """A dense layer, a bare square matrix, and a dense layer to the classes."""

  def __init__(self, features: int, hidden: int, classes: int, rngs: nnx.Rngs):
    """Makes the parameters.

    Args:
      features: of the input.
      hidden: width.
      classes: of the output.
      rngs: random streams for the initialisation.
    """
    self.up = nnx.Linear(features, hidden, rngs=rngs)
    self.norm = nnx.LayerNorm(hidden, rngs=rngs)
    # A parameter used without a layer around it, by the plain operator.
    orthogonal = jax.nn.initializers.orthogonal()
    self.mix = nnx.Param(orthogonal(rngs.params(), (hidden, hidden)))
    self.head = nnx.Linear(hidden, classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Logits (b, classes) of x (b, features)."""
    x = nnx.relu(self.norm(self.up(x)))
    x = nnx.relu(x @ self.mix)
    return self.head(x)
