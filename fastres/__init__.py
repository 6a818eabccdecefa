"""fastres: ResNets from PyTorch, folded, fused and checked."""

__version__ = "0.1.0"
