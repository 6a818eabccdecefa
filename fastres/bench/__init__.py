"""Benchmarks.

presets lists cases, run measures them with perf.timing, accuracy refuses wrong outputs, baselines
are the contenders and probes the extras, results holds data, report renders it (html, plots),
compare reads two reports, demo shows it.
"""
