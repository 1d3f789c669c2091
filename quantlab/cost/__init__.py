"""What a plan costs: bytes, products, energy, time, memory; from shapes alone.

`nbytes`, `macs`, `bops`, `energy` and a `LatencyTable` take a plan and give a
number for every site, so that the costs of a plan add up over its sites and may
enter an allocation (`ql.allocate`); `peak_memory` takes a function.
"""

from quantlab.cost.compute import Energy as Energy
from quantlab.cost.compute import bops as bops
from quantlab.cost.compute import energy as energy
from quantlab.cost.compute import macs as macs
from quantlab.cost.latency import LatencyTable as LatencyTable
from quantlab.cost.latency import roofline as roofline
from quantlab.cost.storage import nbytes as nbytes
from quantlab.cost.storage import rest_nbytes as rest_nbytes
from quantlab.graph.liveness import peak_memory as peak_memory
