"""The compiler: programs, sites, and the one rewrite."""

from quantlab.graph.sites import Analysis as Analysis
from quantlab.graph.sites import Site as Site
