"""Optimizers: moments in 8 bits, annealing onto a grid."""

from quantlab.optim.eight_bit import FIELDS as FIELDS
from quantlab.optim.eight_bit import eight_bit as eight_bit
