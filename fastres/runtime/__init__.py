"""Runs plans.

executor walks the steps, cuda_graph captures and replays it, guards say whether a call may be fused
and whether weights changed, live joins them into LiveModule, verify compares two modules against
float64 and verify_steps single steps, by the rule in tolerance. Knows no model.
"""
