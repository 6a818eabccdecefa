"""Fuses modules that are not ours.

optimize makes a FastModel (whole module traced) or a FastShell (each part.Part traced); dynamo is
the torch.compile backend; fx_program is the plan for compilers, exporters and transforms. The
source is never changed.
"""
