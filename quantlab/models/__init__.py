"""The workload zoo: small pure models, as functions of nested parameters."""

from quantlab.models.workload import Workload as Workload
from quantlab.models.zoo import WORKLOADS as WORKLOADS
from quantlab.models.zoo import workload as workload
