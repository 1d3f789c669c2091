"""Optimizers: moments in 8 bits, annealing onto a grid."""

from quantlab.optim.eight_bit import FIELDS as FIELDS
from quantlab.optim.eight_bit import eight_bit as eight_bit
from quantlab.optim.parq import ParqState as ParqState
from quantlab.optim.parq import inverse_slope as inverse_slope
from quantlab.optim.parq import parq as parq
from quantlab.optim.parq import prox as prox
from quantlab.optim.parq import ranges as ranges
