# %% [markdown]
# # A ternary language model
#
# BitNet b1.58 trains every weight inside its blocks to be one of three values.
# This notebook trains such a model on characters, looks at what becomes of its
# weights, freezes it to two bits a weight and lets it write. Nothing is
# downloaded: the text is the source code of Python's standard library. On two
# cores a size of its own takes minutes; `QUANTLAB_STEPS` and `QUANTLAB_WIDTH`
# in the environment make it smaller.

# %%
import functools
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import quantlab as ql
from quantlab import data
from quantlab.data import text
from quantlab.models import bitnet, llama

STEPS = int(os.environ.get('QUANTLAB_STEPS', '600'))
WIDTH = int(os.environ.get('QUANTLAB_WIDTH', '128'))
CONTEXT = 64

# %% [markdown]
# ## The model
#
# A Llama with a norm directly before every product of a ternary weight. It is
# a pure function of parameters and tokens, and knows nothing of quantization.

# %%
config = bitnet.language_model(text.VOCABULARY, WIDTH, blocks=3)
apply = functools.partial(llama.apply, config=config)
params = jax.jit(functools.partial(llama.init, config=config))(
  jax.random.key(0)
)
print(f'{sum(x.size for x in jax.tree.leaves(params)):,} parameters')

# %% [markdown]
# ## The recipe
#
# Weights are -1, 0 or 1 times their mean magnitude, activations have eight
# bits and a scale for each token. Embedding, head and norms stay in float.
# Rounding has no gradient, so it is passed straight through; quantization sets
# in over the first steps.

# %%
recipe = ql.recipe(
  {
    '/blocks/.*/(w[qkvo]|gate|up|down)$': ql.rule(
      weight=ql.ternary(per='tensor', scale=ql.scales.absmean()),
      input=ql.int8(per='token'),
    )
  }
)
training, held_out = text.split(text.characters(text.EMBEDDED))
draws = data.Draws(text.Windows(training, CONTEXT), 16, steps=STEPS, seed=0)
tokens, _ = draws[0]
plan = ql.plan(apply, params, recipe, tokens)
estimator = ql.estimators.warm_up(ql.estimators.ste())
train = ql.qat(apply, plan, estimator)
variables = train.init(params, [(tokens,)])

# %% [markdown]
# ## Training
#
# An ordinary loop over an ordinary loss. The learning rate is higher than a
# float model would take: a weight has to travel far to become another value.

# %%
optimizer = optax.multi_transform(
  {
    'weight': optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(optax.cosine_decay_schedule(8e-3, STEPS), b2=0.95),
    ),
    'step': optax.set_to_zero(),
    'state': optax.set_to_zero(),
  },
  plan.labels(variables),
)


def loss(variables, x, y):
  """Nats a character."""
  logits = train.apply(variables, x)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def step(variables, state, strength, x, y):
  """One step, with quantization set in to `strength`."""
  variables = ql.set_leaves(variables, 'strength', strength)
  value, gradient = jax.value_and_grad(loss)(variables, x, y)
  updates, state = optimizer.update(gradient, state, variables)
  return optax.apply_updates(variables, updates), state, value


state, losses = optimizer.init(variables), []
for i, (x, y) in enumerate(data.iterator(draws)):
  strength = min(1.0, (i + 1) / (0.1 * STEPS))
  variables, state, value = step(variables, state, strength, x, y)
  losses.append(float(value))
variables = ql.set_leaves(variables, 'strength', 1.0)

# %%
rows = text.Windows(held_out, CONTEXT, stride=CONTEXT)
x, y = rows.take(np.linspace(0, len(rows) - 1, 64).astype(int))
simulated = float(jax.jit(loss)(variables, x, y))
print(f'training loss {losses[0]:.2f} -> {np.mean(losses[-10:]):.2f}')
print(f'held-out loss {simulated:.3f} nats a character')

# %% [markdown]
# ## Its weights
#
# What is trained are floats; what counts is which third of the line each lies
# in. About three in ten are zero at the start, as for any bell curve.


# %%
def shares(weights):
  """Share of weights that become zero, by matrix."""
  coded = train.freeze({**variables, 'weights': weights}, tokens).params
  return {
    f'{i} {part} {name}': float((np.asarray(q.dequantize()) == 0).mean())
    for i, block in enumerate(coded['weights']['blocks'])
    for part in ('attention', 'mlp')
    for name, q in block[part].items()
    if isinstance(q, ql.QTensor)
  }


before, after = shares(params), shares(variables['weights'])
print(f'zeros before {np.mean(list(before.values())):.3f}', end=', ')
print(f'after {np.mean(list(after.values())):.3f}')

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
for label, tree in (('before', params), ('after', variables['weights'])):
  w = np.asarray(tree['blocks'][1]['mlp']['up'])
  values = w.ravel() / np.abs(w).mean()
  left.hist(values, bins=120, range=(-4, 4), alpha=0.6, label=label)
for edge in (-0.5, 0.5):
  left.axvline(edge, color='black', lw=0.8)
left.set_xlabel('weight over mean magnitude, block 1, up')
left.legend()
right.barh(list(after), list(after.values()))
right.set_xlabel('share of zeros after training')
right.tick_params(labelsize=6)
fig.tight_layout()
plt.show()

# %% [markdown]
# ## Frozen
#
# `freeze` gives the codes and scales that training simulated, packed; products
# run on them as integers. Saved and loaded, it computes the same.

# %%
model = train.freeze(variables, tokens)
print(model.params['weights']['blocks'][0]['mlp']['up'])
with tempfile.TemporaryDirectory() as folder:
  path = pathlib.Path(folder) / 'bitnet'
  ql.save(path, model)
  model = ql.load(path, apply)
logits = jax.jit(model.apply)(model.params, x)
found = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
print(f'frozen held-out loss {float(found):.3f}')
print(f'{ql.nbytes(params):,} bytes of float, {model.nbytes:,} frozen')

# %% [markdown]
# ## It writes
#
# Token by token with a cache: another function of the same parameters, planned
# by the same recipe.

# %%
LENGTH = 120
prompt = jnp.asarray(text.encode('def ')[None].astype(np.int32))
cache = llama.empty_cache(1, prompt.shape[1] + LENGTH, config)
decode = functools.partial(llama.step, config=config)
decode_plan = ql.plan(decode, params, recipe, cache, prompt[:, :1], 0)
run = ql.quantized(decode, decode_plan)


@jax.jit
def write(params, key):
  """The prompt's continuation, drawn at a temperature of 0.7."""
  logits, filled = run(params, cache, prompt, 0)

  def body(carry, i):
    last, filled = carry
    token = jax.random.categorical(jax.random.fold_in(key, i), last / 0.7)
    place = prompt.shape[1] + i
    logits, filled = run(params, filled, token[:, None], place)
    return (logits[:, -1], filled), token[0]

  return jax.lax.scan(body, (logits[:, -1], filled), jnp.arange(LENGTH))[1]


jax.block_until_ready(write(model.params, jax.random.key(0)))  # compiles
start = time.perf_counter()
written = jax.block_until_ready(write(model.params, jax.random.key(1)))
seconds = time.perf_counter() - start
print('def ' + text.decode(written))
print(f'\n{LENGTH / seconds:.0f} characters a second')
