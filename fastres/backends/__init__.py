"""What computes one plan step, or a group of them.

aten is the base class and reference; onednn, cudnn and triton override it; fused holds kernels for
groups. kernel_choice decides: forced, measured (tuning_cache), or kernel_table. select picks a
backend for a device. Add a fused kernel as one class in fused.
"""
