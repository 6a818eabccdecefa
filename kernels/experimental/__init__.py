"""Kernels that have not beaten what they replace in a published run on a GPU; see README.md here.

Imported only where FASTRES_KERNELS names one of them, and by their tests and benchmarks.
"""
