"""Real kernels, one instruction removed or weakened: the machine notices, or it is harmless.

``HARMLESS`` says why those that nothing notices change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from . import cases
from .driver import running
from .machine import Fault
from .parse import Unknown

REMOVED = {
    "barrier": r"bar\.sync\s+0;",
    "commit": r"cp\.async\.commit_group;",
    "wait": r"cp\.async\.wait_group\s+\d+;",
    "proxy fence": r"fence\.proxy\.async\S*;",
    "register fence": r"wgmma\.fence\.sync\.aligned;",
    "product commit": r"wgmma\.commit_group\.sync\.aligned;",
    "product wait": r"wgmma\.wait_group\.sync\.aligned\s+\d+;",
    "bulk commit": r"cp\.async\.bulk\.commit_group;",
    "bulk wait": r"cp\.async\.bulk\.wait_group\.read\s+\d+;",
    "mbarrier wait": r"@!complete bra\.uni waitLoop;",
    "arrival": r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;",
    "start of a kernel": r"griddepcontrol\.wait;",
}
REPLACED = {
    "wait for fewer": (r"(cp\.async\.wait_group\s+)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}"),
    "product wait for fewer": (
        r"(wgmma\.wait_group\.sync\.aligned\s+)(\d+)",
        lambda m: f"{m[1]}{int(m[2]) + 1}",
    ),
    "other phase": (
        r"(try_wait\S+ complete, \[%r\d+\], )(%r\d+)",
        lambda m: f"{m[1]}1",
    ),
    "fewer bytes": (r"(expect_tx\S+ _, \[%r\d+\], )(\d+)", lambda m: f"{m[1]}{int(m[2]) - 16}"),
    "predicate of a load": (r"@!?%p\d+ (ld\.global)", lambda m: m[1]),
    "predicate of a store": (r"@!?%p\d+ (st\.global)", lambda m: m[1]),
    "predicate of an atomic": (r"@!?%p\d+ (atom)", lambda m: m[1]),
    "predicate of a bulk copy": (r"@!?%p\d+ (cp\.async\.bulk\.tensor)", lambda m: m[1]),
    "size of a copy": (r"(cp\.async\.c[ag]\.[^;]*0x)(\w+), %r\d+;", lambda m: f"{m[1]}{m[2]};"),
    "order of an atomic": (r"atom\.global\.gpu\.acq_rel", lambda m: "atom.global.gpu.relaxed"),
    "fragments of a": (
        r"(mma\.sync[^{]*\{[^}]*\}, \{ ?)(%r\d+), (%r\d+)",
        lambda m: f"{m[1]}{m[3]}, {m[2]}",
    ),
    "fragments of ldmatrix": (
        r"(ldmatrix[^{]*\{)(%r\d+), (%r\d+)",
        lambda m: f"{m[1]}{m[3]}, {m[2]}",
    ),
    "sums of wgmma": (
        r"(wgmma\.mma_async\S+ \{)(%r\d+),(%r\d+)",
        lambda m: f"{m[1]}{m[3]},{m[2]}",
    ),
    "swizzle": (r"(xor\.b32\s+%r\d+, %r\d+, )(16|32|64);", lambda m: f"{m[1]}0;"),
}

HARMLESS = {
    "barrier": "another barrier stands between the same accesses: Triton sets one around each "
    "operation on an mbarrier, all of which one thread does",
    "commit": "its copies join the next group, which is waited for no later",
    "wait": "after the loop, where no copy is on its way",
    "wait for fewer": "after the loop, where no copy is on its way",
    "register fence": "since the fence before it only products of the same shape wrote the sums",
    "bulk wait": "another wait follows before what the store reads is written again",
    "predicate of a load": "its address is clamped into the tensor, and what is computed from it "
    "lies beyond the edge, where nothing is stored",
    "predicate of a bulk copy": "all threads store the box that one should, the same bytes, and "
    "all wait for it",
    "size of a copy": "its address is clamped into the tensor, and the other operand is zero "
    "there, or what is computed from it lies beyond the edge",
}
"""Why a mutant of this kind may pass."""


@dataclass(frozen=True)
class Mutant:
    kernel: str
    target: str
    kind: str
    line: int
    text: str


def mutants(kernel: str, target: str, text: str, each: int) -> Iterator[Mutant]:
    """At most ``each`` of each kind, spread over the program."""
    changes = {kind: (pattern, lambda m: "") for kind, pattern in REMOVED.items()} | REPLACED
    for kind, (pattern, change) in changes.items():
        places = list(re.finditer(pattern, text))
        for n in range(min(each, len(places))):
            m = places[n * len(places) // min(each, len(places))]
            mutated = text[: m.start()] + change(m) + text[m.end() :]
            line = text.count("\n", 0, m.start()) + 1
            yield Mutant(kernel, target, kind, line, mutated)


SUBJECTS = {
    "sm_80": (
        "conv2d 3x3 bfloat16 128-64-32",
        "conv2d split float16 64-32-64",
        "stem NCHW float16 16-1",
        "head float16 1-32",
    ),
    "sm_90": (
        "conv2d split float16 64-32-64",
        "gemm float16 64-64-64",
        "dual_gemm float16 64-64-64",
        "b2b_gemm float16 64-64-4",
    ),
}


def subject(name: str, target: str) -> cases.Case:
    return next(case for case in cases.every(target) if case.name().startswith(name))


def verdict(case: cases.Case, mutant: Mutant, early: bool) -> str:
    """What the machine says of the mutant; empty where it notices nothing."""
    try:
        with running(mutant.target, early=early, edit=lambda text: mutant.text):
            return case.wrong(case.run())
    except (Fault, Unknown) as error:
        return str(error).partition("\n")[0].partition(": ")[2]


def judged(target: str, each: int) -> Iterator[tuple[Mutant, str]]:
    for name in SUBJECTS[target]:
        case, early = subject(name, target), target != "sm_80"
        seen: list[str] = []

        def keep(text: str, seen: list[str] = seen) -> str:
            seen.append(text)
            return text

        with running(target, early=early, edit=keep):
            assert not case.wrong(case.run())
        for mutant in mutants(case.name(), target, seen[0], each):
            yield mutant, verdict(case, mutant, early)
