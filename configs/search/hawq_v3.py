r"""HAWQ-v3's allocation problem: ResNet-18 at 4 and 8 bits.

  python -m experiments.search --config=configs/search/hawq_v3.py \
    --workdir=runs/hawq_v3

The constants are those of the published notebook (arXiv 2011.10680;
github.com/Zhen-Dong/HAWQ, MIT): traces, squared perturbations, parameters,
multiply-accumulates and milliseconds of 19 layers, first and last left out.
Expect the objectives -1.2332 (size), -1.0920 (BOPs) and -1.1050 (latency).
"""

import ml_collections

TRACE = (
  0.06857826,
  0.03162379,
  0.03298575,
  0.01205663,
  0.02222431,
  0.00596336,
  0.06931772,
  0.00807129,
  0.00372905,
  0.00530698,
  0.00209011,
  0.00737569,
  0.00210454,
  0.00151197,
  0.00158041,
  0.00078146,
  0.00451841,
  0.00098745,
  0.00072944,
)
DELTA8 = (
  0.0235,
  0.0125,
  0.0102,
  0.0082,
  0.0145,
  0.0344,
  0.0023,
  0.0287,
  0.0148,
  0.0333,
  0.0682,
  0.0027,
  0.0448,
  0.0336,
  0.0576,
  0.113,
  0.0102,
  0.0947,
  0.0532,
)
DELTA4 = (
  6.743,
  3.9691,
  3.3281,
  2.6796,
  4.7277,
  10.5966,
  0.6827,
  9.0942,
  4.8857,
  10.7599,
  21.7546,
  0.8603,
  14.5324,
  10.9651,
  18.7706,
  36.4044,
  3.1572,
  29.6994,
  17.4016,
)
PARAMS = (
  36864,
  36864,
  36864,
  36864,
  73728,
  147456,
  8192,
  147456,
  147456,
  294912,
  589824,
  32768,
  589824,
  589824,
  1179648,
  2359296,
  131072,
  2359296,
  2359296,
)
MACS = (
  115605504,
  115605504,
  115605504,
  115605504,
  57802752,
  115605504,
  6422528,
  115605504,
  115605504,
  57802752,
  115605504,
  6422528,
  115605504,
  115605504,
  57802752,
  115605504,
  6422528,
  115605504,
  115605504,
)
LATENCY4 = (
  0.21094404,
  0.21092674,
  0.21104113,
  0.21086851,
  0.13642465,
  0.19167506,
  0.02532183,
  0.19148203,
  0.19142914,
  0.11395316,
  0.20556011,
  0.01917474,
  0.20566918,
  0.20566509,
  0.13185102,
  0.22287786,
  0.01790088,
  0.22304611,
  0.22286099,
)
LATENCY8 = (
  0.36189111,
  0.36211718,
  0.31141909,
  0.30454471,
  0.19184896,
  0.38948934,
  0.0334169,
  0.38904905,
  0.3892859,
  0.19134735,
  0.34307431,
  0.02802354,
  0.34313329,
  0.34310756,
  0.21117103,
  0.37376585,
  0.02896843,
  0.37398187,
  0.37405185,
)
LAYERS = tuple(f'x{i}' for i in range(len(TRACE)))
# A downsampling convolution and the path beside it are added: one width.
TIES = tuple((LAYERS[i], LAYERS[j]) for i, j in ((4, 6), (9, 11), (14, 16)))
ALPHA = 0.5


def _pairs(four, eight):
  return tuple(zip(four, eight, strict=True))


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.rows = tuple((name, ('4', '8')) for name in LAYERS)
  config.metric = 'trace'
  config.unit = 'tr(H)/n |dW|^2, over that at 4 bits'
  # Relative to four bits everywhere, as the notebook has it.
  config.sensitivity = tuple(
    (0.0, t * (d8 - d4))
    for t, d8, d4 in zip(TRACE, DELTA8, DELTA4, strict=True)
  )
  config.costs = {
    'size': _pairs(  # MiB
      [n * 4 / 8 / 2**20 for n in PARAMS], [n / 2**20 for n in PARAMS]
    ),
    'bops': _pairs([m / 64e6 for m in MACS], [m / 16e6 for m in MACS]),
    'latency': _pairs(LATENCY4, LATENCY8),  # milliseconds on a T4
  }
  config.budgets = {
    name: sum(a + ALPHA * (b - a) for a, b in pairs)
    for name, pairs in config.costs.items()
  }
  config.ties = TIES
  config.methods = ('dp', 'milp', 'greedy', 'random')
  return config
