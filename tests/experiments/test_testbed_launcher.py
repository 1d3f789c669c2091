"""The launcher of the test beds: what it writes is what it judged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.testbeds import text
from experiments import testbed
from quantlab.core.tree import named_leaves


def test_the_file_holds_the_model_that_was_judged(tmp_path):
  config = text.get_config('llama')
  config.model.update(dim=8, hidden=8, blocks=1, heads=2, kv_heads=2)
  config.update(context=8, files=10, steps=51, batch=2, keep=3)
  found = testbed.run(config, str(tmp_path / 'bed.npz'))
  arrays = dict(np.load(tmp_path / 'bed.npz'))
  tokens = {name: arrays.pop(name) for name in ('calibration', 'evaluation')}
  assert {x.shape for x in tokens.values()} == {(3, 9)}
  assert {x.dtype for x in arrays.values()} == {np.dtype(np.float16)}
  apply, init = testbed.model(config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  leaves = [
    jnp.asarray(arrays.pop(k), jnp.float32) for k, _ in named_leaves(shapes)
  ]
  assert not arrays
  params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
  x = tokens['evaluation'].astype(np.int32)
  chances = jax.nn.log_softmax(jax.jit(apply)(params, x[:, :-1]))
  nats = -np.take_along_axis(np.asarray(chances), x[:, 1:, None], -1).mean()
  assert found == {'nats': pytest.approx(float(nats), rel=1e-5)}
