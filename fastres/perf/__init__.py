"""How long things take.

timing measures callables interleaved, by the clocks of runtime.clocks, roofline bounds a plan from
below, forecast predicts kernels on a GPU that is not here, ceilings measures the machine, autotune
measures all kernels that a network could take, environment records the machine.
"""
