"""LP layers against HiGHS, cvxpylayers and the bare sweeps, on real images.

FC-SMALL trained naturally (eps 0.02 and 0.05) and by Box (eps 0.1): LP-LAST and LP-ALL; CONV: LP-LAST's memory;
both: which neurons the ascent keeps.
"""

from __future__ import annotations

from benchmarks import lp_all, lp_conv, lp_last, lp_ways
from benchmarks.lp_cases import FULL, QUICK, settings
from benchmarks.reports import Bar, Options, Report, Row, environment

TITLE = "LP layers: the triangle LP against HiGHS, cvxpylayers and the bare sweeps"


def run(options: Options) -> Report:
    """Every table."""
    sizes = QUICK if options.quick else FULL
    facts = environment(options)
    last: list[lp_last.Found] = []
    whole: list[Row] = []
    bars: list[Bar] = []
    cases = [setting.case(sizes.images, options) for setting in settings(sizes, options.seed)]
    for case in cases:
        last.append(lp_last.measure(case, sizes, options))
        rows = lp_all.measure(case, sizes, options)
        whole += rows
        bars += [*lp_last.bars(case.name, last[-1]), *lp_all.bars(rows)]
    conv = lp_conv.measure(sizes, options)
    bars += lp_conv.bars(conv, sizes.images)
    tables = [*lp_last.tables(last, sizes), lp_all.table(whole, sizes), conv]
    if options.device == "cpu":
        cases.append(lp_conv.setting(sizes.conv_epochs, options.seed).case(sizes.images, options))
        tables.append(lp_ways.measure(cases, options))
    return Report("lp_layers", TITLE, options, tables, bars, facts)
