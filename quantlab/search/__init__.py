"""Which format each site gets: what it would do, what it costs, the choice."""

from quantlab.search.allocate import Allocation as Allocation
from quantlab.search.allocate import allocate as allocate
from quantlab.search.allocate import pareto as pareto
from quantlab.search.bisection import Bisection as Bisection
from quantlab.search.bisection import bisect as bisect
from quantlab.search.knapsack import Front as Front
from quantlab.search.table import Row as Row
from quantlab.search.table import Table as Table
