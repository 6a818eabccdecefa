"""From an nn.Module to a plan.

trace records it with torch.fx, fx_graph turns the nodes into operations of ir (match knows which),
fold attaches batch norms, plan merges epilogues and orders steps, patterns finds groups of steps.
Pure: no weights, no devices. Add an operation in ir, match and plan, and a method in backends.aten.
"""
