"""A launch: PTX, memory and a grid."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import lru_cache

import numpy as np

from .global_memory import Memory, Order
from .instructions import decode
from .machine import Fault, Machine, Step
from .parse import Program, parse

LANES = 8192  # threads that run at once


@lru_cache(256)
def prepared(text: str) -> tuple[Program, list[Step]]:
    program = parse(text)
    return program, [decode(program, i) for i in program.code]


def launch(
    text: str,
    memory: Memory,
    values: list[int],
    *,
    grid: int = 1,
    shared: int = 0,
    seed: int = 0,
    blocks: int | None = None,
) -> Counter[str]:
    """Run the blocks of a grid in random order, as many at a time as there are threads for.

    ``values`` are the parameters; those that are missing are 0. At most ``blocks`` run, where that
    is given. Returns how many warps executed each opcode, where the memory has a profile.
    """
    program, steps = prepared(text)
    given = itertools.chain(values, itertools.repeat(0))  # Triton's own workspace comes last
    named = dict(zip(program.parameters, given, strict=False))
    threads = program.threads
    atomics = any(i.opcode.startswith("atom") for i in program.code)
    memory.order = Order(grid, threads // 32, atomics)
    rng = np.random.default_rng(seed)
    order = rng.permutation(grid)[:blocks]
    executed: Counter[str] = Counter()
    for chunk in np.split(order, range(0, len(order), max(1, LANES // threads))[1:]):
        machine = Machine(program, steps, named, memory, chunk, grid, threads, shared, rng)
        try:
            machine.run()
        except Fault as fault:
            raise Fault(f"{program.name}, seed {seed}: {fault}") from None
        finally:
            machine.release_parts()
        executed += machine.executed
    return executed
