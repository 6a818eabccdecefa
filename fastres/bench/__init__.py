"""Benchmarks.

presets lists cases, run measures them with perf.timing, accuracy refuses wrong outputs, baselines
and probes are the others and the extras, results holds data, report renders it (html, plots),
compare reads two reports, demo shows it.
"""
