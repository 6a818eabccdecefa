"""Work that goes on by itself, in groups: cp.async, bulk stores and wgmma wait in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .machine import Machine


@dataclass(eq=False)
class Flight:
    """What one instruction started: by thread, ``lanes`` beside columns of data, and the group of
    each, -1 before its commit. ``written`` and ``held`` are registers that a product uses."""

    lanes: np.ndarray
    data: tuple[np.ndarray, ...]
    group: np.ndarray
    written: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()

    def touches(self, lanes: np.ndarray) -> bool:
        """Whether any of these threads, a mask, takes part."""
        return bool(lanes[self.lanes].any())


class Flights:
    """All of one kind in a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.all: list[Flight] = []
        self.groups = np.zeros(machine.lanes, np.int64)  # committed by each thread

    def start(self, lanes: np.ndarray, *data: np.ndarray, **registers: frozenset[str]) -> None:
        self.all.append(Flight(lanes, data, np.full(len(lanes), -1), **registers))

    def commit(self) -> None:
        on = self.machine.on()
        for flight in self.all:
            mine = (flight.group < 0) & on[flight.lanes]
            flight.group = np.where(mine, self.groups[flight.lanes], flight.group)
        self.groups += on

    def settle(self, left: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Lanes and data of what these threads committed, but for the last ``left`` groups."""
        on = self.machine.on()
        for flight in list(self.all):
            due = (flight.group >= 0) & (flight.group < self.groups[flight.lanes] - left)
            due &= on[flight.lanes]
            if due.any():
                yield flight.lanes[due], *(column[due] for column in flight.data)
            if due.all():
                self.all.remove(flight)
            elif due.any():
                flight.lanes, flight.group = flight.lanes[~due], flight.group[~due]
                flight.data = tuple(column[~due] for column in flight.data)
