"""How long things take.

clocks takes seconds by CUDA events and by the host, timing measures callables interleaved, roofline
bounds a plan from below, forecast predicts kernels on a GPU that is not here, ceilings measures the
machine, autotune measures kernels for backends.kernel_choice, environment records the machine.
"""
