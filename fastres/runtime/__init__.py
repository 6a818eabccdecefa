"""Runs plans.

executor walks the steps, inputs checks what they are given, cuda_graph captures and replays them,
tuning measures kernels before that, for backends.kernel_choice, by the clocks,
guards say whether a call may be fused and whether weights changed, live joins them into LiveModule,
verify compares two modules against float64 and verify_steps single steps, by the rule in tolerance.
Knows no model.
"""
