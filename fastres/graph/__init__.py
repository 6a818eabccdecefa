"""From an nn.Module to a plan.

trace records it with torch.fx, from_fx and match turn nodes into ir operations, fold attaches batch
norms, fuse merges epilogues, plan orders steps, patterns groups steps for one kernel. Pure: no
weights, no devices. Add an operation in ir, match, shapes, and one method in backends/aten.
"""
