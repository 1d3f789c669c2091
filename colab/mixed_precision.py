# %% [markdown]
# # Mixed precision
#
# Which layer can do with three bits, which needs eight? quantlab measures it,
# chooses within a budget, and quantizes by the choice. This notebook downloads
# nothing. First, in a checkout: `pip install .`, or `%pip install .` here.

# %%
import matplotlib.pyplot as plt
import numpy as np

import quantlab as ql
from quantlab import quality, search
from quantlab.data import embedded
from quantlab.models import digits
from quantlab.report import search_plots

# %% [markdown]
# ## A model
#
# A small CNN on scikit-learn's handwritten digits. The options of every
# kernel are four widths; the first labelled images are for measuring
# sensitivities, the others for judging what was chosen.

# %%
data = embedded.digits()
model = digits.Cnn((8, 16, 16))
params = digits.train_digits(model, epochs=8)
images = digits.preprocess(data.test_x)
measured = [(images[:128], data.test_y[:128].astype(np.int32))]
judged = [(images[128:], data.test_y[128:].astype(np.int32))]
calibration = [digits.preprocess(data.train_x[:128])]
widths = [ql.int2(), ql.int3(), ql.int4(), ql.int8()]

# %% [markdown]
# ## The table
#
# One row a site, one column a format. `kl` runs the quantized model, once for
# each entry and compiled once for all of them; `hessian` expands the loss to
# the second order along the errors of quantization, exactly. Every number has
# its standard error.

# %%
tables = ql.sensitivity(
  model.apply,
  params,
  {'/kernel$': widths},
  measured,
  ('kl', 'hessian'),
  task=quality.classification,
  interactions=True,
)
figure, axes = plt.subplots(1, 2, figsize=(12, 3), layout='constrained')
for ax, table in zip(axes, tables.values(), strict=True):
  search_plots.sensitivity_bars(ax, table)
plt.show()

# %% [markdown]
# ## The choice
#
# A budget in bytes, scales included: that of three bits everywhere. The front
# holds the best choice for every other budget too.

# %%
table = search.additive(tables['kl'])
uniform = search.Allocation(table, table.uniform('int3'), 'uniform', {})
budget = uniform.costs['bytes']
chosen = {
  'uniform': uniform,
  'kl': ql.allocate(table, budget),
  'hessian': ql.allocate(tables['hessian'], budget, 'quadratic'),
  'random': ql.allocate(table, budget, 'random'),
}
for name, found in chosen.items():
  print(name, found.options, f'{found.costs["bytes"]:.0f} bytes')
front = search.pareto(table)
figure, ax = plt.subplots(figsize=(7, 3), layout='constrained')
points = {
  n: (a.costs['bytes'], table.predict(a.choice)) for n, a in chosen.items()
}
search_plots.front(ax, front.cost, front.value, points, value='KL (nats)')
plt.show()

# %% [markdown]
# ## The model
#
# `ql.ptq` takes an allocation as it takes a recipe; so do `ql.plan` and, with
# its plan, `ql.qat`. The bytes are those that were promised. A further argument
# such as `ql.gptq()` quantizes better than rounding to nearest.

# %%
for name, found in chosen.items():
  quantized = ql.ptq(model.apply, params, found, calibration)
  result = quality.assess(
    model.apply,
    params,
    quantized.apply,
    quantized.params,
    judged,
    quality.classification,
  )
  accuracy = result['quality']['accuracy'].value
  kl = result['contrast']['kl_mean'].value
  same = quantized.nbytes == found.costs['bytes']
  print(f'{name:8} accuracy {accuracy:.3f}  KL {kl:.4f}  as promised: {same}')
