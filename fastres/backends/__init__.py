"""What computes a step of a plan, or several at once.

aten holds the base class, oneDNN and cuDNN; triton our kernels, fused those for several steps.
kernel_choice decides: forced, measured, or by kernel_table. select picks a backend for a device,
memory_format knows layouts. Add a fused kernel as one class in fused.
"""
