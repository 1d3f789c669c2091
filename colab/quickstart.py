# %% [markdown]
# # quantlab in five minutes
#
# quantlab takes a pure function and its parameters and gives back a pure
# function and quantized parameters. This notebook downloads nothing and needs
# no accelerator. First, in a checkout: `pip install .`, or `%pip install .` in
# a notebook that is running already (with `-e` it would have to be restarted).

# %%
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import quantlab as ql
from quantlab.data import embedded
from quantlab.models import digits

# %% [markdown]
# ## Your own model
#
# Any function of parameters and inputs will do. Here is one of two layers,
# trained for a second or so on scikit-learn's 8x8 handwritten digits.

# %%
data = embedded.digits()
train_x, test_x = (digits.preprocess(x) for x in (data.train_x, data.test_x))


def apply(params, x):
  """Logits of images (batch, 8, 8, 1)."""
  x = x.reshape(-1, 64)
  x = jax.nn.relu(x @ params['hidden']['w'] + params['hidden']['b'])
  return x @ params['out']['w'] + params['out']['b']


keys = jax.random.split(jax.random.key(0))
params = {
  'hidden': {
    'w': jax.random.normal(keys[0], (64, 64)) / 8,
    'b': jnp.zeros(64),
  },
  'out': {'w': jax.random.normal(keys[1], (64, 10)) / 8, 'b': jnp.zeros(10)},
}
optimizer = optax.adam(1e-2)


@jax.jit
def step(params, state):
  """One step on the whole training set."""

  def loss(params):
    logits = apply(params, train_x)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, data.train_y
    ).mean()

  updates, state = optimizer.update(jax.grad(loss)(params), state)
  return optax.apply_updates(params, updates), state


state = optimizer.init(params)
for _ in range(100):
  params, state = step(params, state)

# %% [markdown]
# Five lines quantize it: a recipe says by regular expression on the paths of
# the parameters what becomes what; `ptq` reads a few batches and does it; what
# comes back is called as before.

# %%
rule = ql.rule(weight=ql.int4(group=16), input=ql.int8(per='token'))
recipe = ql.recipe({'/w$': rule})
batches = [train_x[:128], train_x[128:256]]
model = ql.ptq(apply, params, recipe, batches)
logits = jax.jit(model.apply)(model.params, test_x)

# %%
labelled = [(test_x, data.test_y)]


def accuracy(apply, params):
  """Share of the test images that are classified right."""
  return float(ql.evaluate(apply, params, labelled)['accuracy'].value)


print(f'float      {accuracy(apply, params):.3f}  {ql.nbytes(params)} bytes')
print(
  f'quantized  {accuracy(model.apply, model.params):.3f}  '
  f'{ql.nbytes(model.params)} bytes'
)

# %% [markdown]
# `model.params` is an ordinary pytree whose coded leaves are `ql.QTensor`:
# packed codes and their scales.

# %%
model.params['weights']['hidden']['w']

# %% [markdown]
# ## A vision transformer
#
# The same line works on other JAX programs too, because products of parameters
# are found in the trace and not by layer class. `digits.Vit` is a small Linen
# transformer that trains in seconds.

# %%
vit = digits.Vit()
variables = digits.train_digits(vit, epochs=8)
print(f'float {accuracy(vit.apply, variables):.3f}')

# %% [markdown]
# A plan is made from shapes alone, before any work: what each site becomes,
# what it weighs, what stays in float. The first and the last layer do here; the
# others get weights of three bits and a scale for each 24 of them. A rule that
# matches nothing, or a group that does not divide, would be an error now.

# %%
calibration = [train_x[i : i + 128] for i in range(0, 512, 128)]
three_bits = {
  '/(embed|head)/': None,
  '/kernel$': ql.rule(weight=ql.int3(group=24)),
}
plan = ql.plan(vit.apply, variables, ql.recipe(three_bits), calibration[0])
print(plan.summary())

# %% [markdown]
# ## GPTQ against round to nearest
#
# Both have the same grid to choose from. `ql.rtn()` takes what is nearest to
# each weight; `ql.gptq()` walks through the blocks and, by the inputs that it
# sees there, lets weights not yet rounded make up for what the rounded ones
# lost.

# %%
rtn = ql.ptq(vit.apply, variables, three_bits, calibration, ql.rtn())
gptq = ql.ptq(vit.apply, variables, three_bits, calibration, ql.gptq())
for name, found in {'rtn': rtn, 'gptq': gptq}.items():
  same = ql.compare(
    vit.apply, variables, found.apply, found.params, [(test_x,)]
  )
  print(
    f'{name:5} accuracy {accuracy(found.apply, found.params):.3f}, '
    f'agreement with float {float(same["agreement"].value):.3f}'
  )

# %% [markdown]
# Site by site: the ratio of signal to quantization noise in what each product
# gives, on test images. The noise includes what earlier sites did to its input.


# %%
def output_sqnr(found):
  """Decibels by site."""
  sites = ql.site_sqnr(vit.apply, variables, found, [test_x[:128]])
  return {name: float(v['output']) for name, v in sites.items()}


nearest, compensated = output_sqnr(rtn), output_sqnr(gptq)
fig, ax = plt.subplots(figsize=(7, 4), layout='constrained')
rows = np.arange(len(nearest))
ax.barh(rows - 0.2, list(nearest.values()), 0.4, label='round to nearest')
ax.barh(rows + 0.2, [compensated[k] for k in nearest], 0.4, label='GPTQ')
ax.set_yticks(rows, list(nearest))
ax.invert_yaxis()
ax.set_xlabel('SQNR of the output (dB)')
fig.legend(loc='outside upper center', ncols=2)
plt.show()

# %% [markdown]
# ## Save and load
#
# A checkpoint describes itself and holds no code: `load` takes the function
# again. What comes back computes the same, bit for bit.

# %%
with tempfile.TemporaryDirectory() as folder:
  path = pathlib.Path(folder) / 'vit'
  ql.save(path, gptq)
  loaded = ql.load(path, vit.apply)
before = jax.jit(gptq.apply)(gptq.params, test_x)
after = jax.jit(loaded.apply)(loaded.params, test_x)
print('the same:', bool((before == after).all()))
