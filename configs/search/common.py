"""What the searches of all models have in common; not a config by itself."""

import ml_collections

WIDTHS = (2, 3, 4, 6, 8)


def options(**fields):
  """Weights of 2 to 8 bits, with the other fields of a quantizer."""
  return tuple({'weight': {'format': f'int{b}', **fields}} for b in WIDTHS)


def base(model: str) -> ml_collections.ConfigDict:
  """The search of one model, as the others have it."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.calibration = 0  # 0: the workload's own choice
  config.evaluation = 0  # 0: all
  config.model = model
  config.batch_size = 0  # of the evaluation set; 0: the workload's own
  config.batches = 2  # labelled, to measure the tables on
  config.curved = 0  # examples of the first one, for derivatives; 0: all
  config.judged = 0  # batches up to which choices are judged; 0: all
  # Every other batch is measured on and the ones between are judged on; for
  # sets in some order. Otherwise the first ones are measured on.
  config.alternate = False
  # Examples that BatchNorms expect, in the place of data: tables and static
  # ranges are of these (ZeroQ). 0: none.
  config.distilled = 0
  config.choices = (('/kernel$', options()),)
  config.metrics = (
    'loss',
    'similarity',
    'kl',
    'output_mse',
    'weight_error',
    'fisher',
    'hessian',
    'trace',
    'eigenvalue',
    'lrp',
  )
  # Metrics whose tables say what every two options do jointly.
  config.interactions = ('loss', 'kl', 'similarity', 'hessian')
  # Direct metrics that are measured again around the option of each budget.
  config.around = ('kl', 'similarity')
  config.probes = 16  # of the trace, for each batch
  config.iterations = 10  # of the eigenvalue
  # Random plans, whose loss the tables are to predict: how many of each kind,
  # and the first option that a kind draws from.
  config.random_plans = 100
  config.kinds = (('2 to 8 bits', 0), ('4 to 8 bits', 2))
  # Options whose uniform cost is a budget, of 'bytes', 'bops' or, from what
  # configs/bench/latency.py measured, 'latency'.
  config.budgets = ('int3', 'int4')
  config.cost = 'bytes'
  config.latency = ''
  config.allocations = (
    ('kl', 'dp'),
    ('kl', 'quadratic'),
    ('kl@', 'dp'),  # around the option of the budget
    ('kl@', 'quadratic'),
    ('kl.gptq', 'dp'),  # measured on what GPTQ makes of each weight
    ('kl.gptq', 'quadratic'),
    ('kl.gptq@', 'dp'),
    ('kl.gptq@', 'quadratic'),
    ('loss', 'dp'),
    ('loss', 'quadratic'),
    ('similarity', 'dp'),
    ('similarity', 'quadratic'),
    ('similarity@', 'dp'),
    ('similarity@', 'quadratic'),
    ('similarity.gptq', 'dp'),
    ('similarity.gptq', 'quadratic'),
    ('similarity.gptq@', 'dp'),
    ('similarity.gptq@', 'quadratic'),
    ('output_mse', 'dp'),
    ('fisher', 'dp'),
    ('hessian', 'dp'),
    ('hessian', 'quadratic'),
    ('trace', 'dp'),
    ('eigenvalue', 'dp'),
    ('lrp', 'dp'),
    ('weight_error', 'dp'),
    ('output_mse', 'greedy'),
    ('output_mse', 'random'),
  )
  # Of the allocations by each metric, and the uniform one, what measures best
  # on the batches of the tables: rounded, or with an encoder.
  config.measured = ('kl', 'kl.gptq', 'similarity', 'similarity.gptq')
  config.draws = 3  # of 'random'
  # Two pairs of (pattern, metric): groups of sites that share each budget.
  config.groups = ()
  config.encoders = ('rtn', 'gptq')
  config.seeds = 5  # of calibration sets, where an encoder reads them
  config.show = ('accuracy', 'cross_entropy', 'kl_mean')
  return config


def by(config, metric, method) -> ml_collections.ConfigDict:
  """A search by one metric and one method, beside random choices."""
  config.metrics = (metric,)
  config.interactions = ()
  config.around = ()
  config.allocations = ((metric, method), (metric, 'random'))
  config.measured = ()
  return config
