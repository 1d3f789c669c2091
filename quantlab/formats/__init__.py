"""What a code can mean: one object a format."""

from quantlab.formats.base import Format as Format
from quantlab.formats.base import get as get
from quantlab.formats.base import names as names
from quantlab.formats.base import register as register
from quantlab.formats.codebook import DYNAMIC8 as DYNAMIC8
from quantlab.formats.codebook import NF4 as NF4
from quantlab.formats.codebook import UDYNAMIC8 as UDYNAMIC8
from quantlab.formats.codebook import Codebook as Codebook
from quantlab.formats.codebook import codebook as codebook
from quantlab.formats.codebook import pow2 as pow2
from quantlab.formats.integer import Integer as Integer
from quantlab.formats.microscaling import PRESETS as PRESETS
from quantlab.formats.minifloat import Minifloat as Minifloat
from quantlab.formats.ternary import BINARY as BINARY
from quantlab.formats.ternary import TERNARY as TERNARY
from quantlab.formats.ternary import Odd as Odd
from quantlab.formats.ternary import odd as odd
