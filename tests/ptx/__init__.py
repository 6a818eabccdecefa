"""A GPU in software: runs the PTX that Triton compiles, and refuses what hardware would get wrong.

docs/ptx.md says what it shows and what it cannot.
"""
