"""What a person reads after a run: tables, pictures, one page."""

from quantlab.report.diagnosis import chosen as chosen
from quantlab.report.diagnosis import look as look
from quantlab.report.html import render as render
from quantlab.report.model_rows import by_variant as by_variant
from quantlab.report.model_rows import site_rows as site_rows
from quantlab.report.model_rows import walk as walk
from quantlab.report.search_page import print_rows as print_rows
from quantlab.report.search_page import render_search as render_search
from quantlab.report.sites import Histogram as Histogram
from quantlab.report.sites import SiteRow as SiteRow
from quantlab.report.sites import histogram as histogram
from quantlab.report.tables import results_table as results_table
from quantlab.report.tables import results_tables as results_tables
from quantlab.report.tables import rows as rows
from quantlab.report.tables import show as show
