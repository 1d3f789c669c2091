"""Which format each site gets: what it would do, what it costs, the choice."""

import typing

from quantlab.search import lazy
from quantlab.search.allocate import METHODS as METHODS
from quantlab.search.allocate import Allocation as Allocation
from quantlab.search.allocate import allocate as allocate
from quantlab.search.allocate import pareto as pareto
from quantlab.search.bisection import Bisection as Bisection
from quantlab.search.bisection import bisect as bisect
from quantlab.search.decoupled import decoupled as decoupled
from quantlab.search.decoupled import joined as joined
from quantlab.search.distill import batch_norms as batch_norms
from quantlab.search.distill import distill as distill
from quantlab.search.distill import scaled as scaled
from quantlab.search.encoded import Encoded as Encoded
from quantlab.search.knapsack import Front as Front
from quantlab.search.measure import Measure as Measure
from quantlab.search.measured import measured as measured
from quantlab.search.program import Inputs as Inputs
from quantlab.search.program import Program as Program
from quantlab.search.sensitivity import METRICS as METRICS
from quantlab.search.sensitivity import sensitivity as sensitivity
from quantlab.search.space import Space as Space
from quantlab.search.space import label as label
from quantlab.search.space import space as space
from quantlab.search.table import Row as Row
from quantlab.search.table import Table as Table
from quantlab.search.table import additive as additive

if typing.TYPE_CHECKING:
  from quantlab.search.study import SAMPLERS as SAMPLERS
  from quantlab.search.study import Study as Study
  from quantlab.search.study import trials_of as trials_of

_LATER = dict.fromkeys(
  ('SAMPLERS', 'Study', 'trials_of'), 'quantlab.search.study'
)
__getattr__ = lazy.attributes(__name__, _LATER, 'search')
