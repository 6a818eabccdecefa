"""How long things take.

timing measures callables interleaved, roofline bounds a plan from below, forecast predicts kernels
on a GPU that is not here, autotune measures kernels for backends.kernel_choice, environment records
the machine.
"""
