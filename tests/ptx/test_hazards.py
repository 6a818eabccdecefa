"""Programs that hardware would get wrong, each beside the one that it gets right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from . import machine
from .copies import PLACE, TensorMap
from .global_memory import Memory
from .launch import launch
from .machine import Fault
from .test_instructions import entry

WORDS = 64
PLACES = """
shl.b32 %r2, %r1, 2;
xor.b32 %r3, %r2, 128;
mad.wide.s32 %rd4, %r1, 4, %rd1;
mad.wide.s32 %rd5, %r1, 4, %rd2;
"""
"""In two warps: %r2 a thread's word in shared memory, %r3 its partner's in the other warp, %rd4 and
%rd5 its words of the first two tensors."""


def attempt(body: str, threads: int = 64, **options) -> torch.Tensor:
    """The second tensor after the program, the first holding 1000, 1001, ..."""
    given = torch.arange(1000, 1000 + WORDS, dtype=torch.int32)
    out = torch.zeros(WORDS, dtype=torch.int32)
    count = torch.zeros(1, dtype=torch.int32)
    memory = Memory()
    values = [memory.add(name, t) for name, t in (("x", given), ("y", out), ("count", count))]
    launch(entry(PLACES + body, threads), memory, values, shared=2048, **options)
    return out


EXCHANGE = """
st.shared.b32 [%r2], %r1;
bar.sync 0;  // stored
ld.shared.b32 %r4, [%r3];
bar.sync 0;  // read
st.shared.b32 [%r2], 7;
st.global.b32 [ %rd5 + 0 ], { %r4 };
"""
COPY = """
cp.async.ca.shared.global [ %r2 + 0 ], [ %rd4 + 0 ], 0x4;
cp.async.commit_group;
cp.async.wait_group 0;
bar.sync 0;  // landed
ld.shared.b32 %r4, [%r3];
st.global.b32 [ %rd5 + 0 ], { %r4 };
"""
PARTNERS = [n ^ 32 for n in range(WORDS)]


def test_what_is_right_comes_through():
    assert attempt(EXCHANGE).tolist() == PARTNERS
    assert attempt(COPY).tolist() == [1000 + n for n in PARTNERS]


BAD = {
    "read too early": (EXCHANGE, "bar.sync 0;  // stored", "", "without a barrier"),
    "written too early": (EXCHANGE, "bar.sync 0;  // read", "", "may still be read"),
    "both write": (EXCHANGE, "st.shared.b32 [%r2], 7", "st.shared.b32 [8], %r1", "at once"),
    "never written": (EXCHANGE, "st.shared.b32 [%r2], %r1;", "", "nothing has written"),
    "outside": (EXCHANGE, "st.shared.b32 [%r2], 7", "st.shared.b32 [%r2+2000], 7", "outside the"),
    "not aligned": (EXCHANGE, "st.shared.b32 [%r2], 7", "st.shared.b32 [%r2+2], 7", "not aligned"),
    "global, outside": (EXCHANGE, "[ %rd5 + 0 ]", "[ %rd5 + 4 ]", "bytes 256 to 260 of y"),
    "before a tensor": (EXCHANGE, "[ %rd5 + 0 ]", "[ %rd5 + -4 ]", "of y, which has 256"),
    "global, not aligned": (EXCHANGE, "[ %rd5 + 0 ]", "[ %rd5 + 2 ]", "not aligned"),
    "copy not waited for": (COPY, "cp.async.wait_group 0;", "", "before the copy"),
    "copy waited for too little": (COPY, "wait_group 0", "wait_group 1", "before the copy"),
    "copy not committed": (COPY, "cp.async.commit_group;", "", "before the copy"),
    "copy seen by others": (COPY, "bar.sync 0;  // landed", "", "without a barrier"),
    "copy not aligned": (COPY, "[ %rd4 + 0 ]", "[ %rd4 + 2 ]", "not aligned"),
    "half a block at a barrier": (
        EXCHANGE,
        "bar.sync 0;  // read",
        "setp.lt.s32 %p1, %r1, 32;\n@%p1 bar.sync 1;\n@!%p1 bar.sync 2;",
        "wait for ever at barriers",
    ),
    "part of a warp at a barrier": (
        EXCHANGE,
        "bar.sync 0;  // read",
        "setp.lt.s32 %p1, %r1, 3;\n@%p1 bar.sync 0;",
        "part of a warp",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused(name):
    body, old, new, message = BAD[name]
    assert body.count(old) == 1
    with pytest.raises(Fault, match=message):
        attempt(body.replace(old, new))


def test_a_named_barrier_of_two_warps_of_three():
    body = EXCHANGE.replace("bar.sync 0;", "bar.sync 1, 64;")
    with pytest.raises(Fault, match="outside the"):
        attempt("setp.gt.s32 %p1, %r1, 63;\n@%p1 st.shared.b32 [4096], 1;" + body, threads=96)
    skip = "setp.gt.s32 %p1, %r1, 63;\n@%p1 bra $end;" + body + "$end:"
    assert attempt(skip, threads=96).tolist() == PARTNERS


def test_a_loop_that_does_not_end(monkeypatch):
    monkeypatch.setattr(machine, "LIMIT", 1000)
    with pytest.raises(Fault, match="does not end"):
        attempt("$on: bra.uni $on;")


SPLIT = """
mov.u32 %r4, %ctaid.x;
shl.b32 %r5, %r4, 2;
cvt.u64.u32 %rd6, %r5;
add.s64 %rd7, %rd2, %rd6;
setp.eq.s32 %p2, %r1, 33;
@%p2 st.global.b32 [ %rd7 + 0 ], { %r4 };
bar.sync 0;  // written
setp.eq.s32 %p1, %r1, 0;
@%p1 atom.global.gpu.acq_rel.add.u32 %r6, [ %rd3 + 0 ], 1;
@%p1 st.shared.b32 [0], %r6;
bar.sync 0;
ld.shared.b32 %r6, [0];
setp.ne.s32 %p3, %r6, 7;
@%p3 bra $end;
setp.lt.s32 %p4, %r1, 8;
mad.wide.s32 %rd8, %r1, 4, %rd2;
@%p4 ld.global.cg.b32 { %r7 }, [ %rd8 + 0 ];
add.s32 %r7, %r7, 500;
@%p4 st.global.b32 [ %rd8 + 128 ], { %r7 };
$end:
"""
"""Eight blocks write a number each; the last to arrive reads all."""


@pytest.mark.parametrize("seed", range(5))
def test_the_last_of_several_blocks_reads_what_all_wrote(seed):
    out = attempt(SPLIT, grid=8, seed=seed)
    assert out[32:40].tolist() == [500 + n for n in range(8)]


def test_what_was_not_released_is_not_read():
    with pytest.raises(Fault, match="did not release"):
        attempt(SPLIT.replace("bar.sync 0;  // written", ""), grid=8)
    with pytest.raises(Fault, match="did not release"):
        attempt(SPLIT.replace("acq_rel", "relaxed"), grid=8)


def test_blocks_come_to_an_atomic_in_an_order_that_the_seed_decides():
    """Without the count, the last block would be another one each time."""
    body = SPLIT.replace("setp.ne.s32 %p3, %r6, 7;", "setp.ne.s32 %p3, %r6, 0;").replace(
        "@%p4 ld.global.cg.b32 { %r7 }, [ %rd8 + 0 ];", "mov.u32 %r7, %ctaid.x;"
    )
    firsts = {int(attempt(body, grid=8, seed=seed)[32]) for seed in range(12)}
    assert len(firsts) > 2


def test_nothing_is_touched_before_the_kernels_before_are_through():
    wait = "griddepcontrol.wait;\n"
    assert attempt(wait + COPY).tolist() == [1000 + n for n in PARTNERS]
    with pytest.raises(Fault, match="before the kernels before"):
        attempt(COPY + wait)


# TMA.

ENGINE = """
setp.eq.s32 %p1, %r1, 0;
@%p1 mbarrier.init.shared::cta.b64 [1024], 1;
bar.sync 0;  // made
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [1024], 256;
@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [0],
    [%rd1, {-1, 1}], [1024];
{
.reg .pred done;
again:
mbarrier.try_wait.parity.shared.b64 done, [1024], 0;
@!done bra.uni again;
}
ld.shared.b32 %r4, [%r2];
add.s32 %r4, %r4, 1;
bar.sync 0;  // read
st.shared.b32 [%r2], %r4;
fence.proxy.async.shared::cta;
bar.sync 0;  // stored
@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {2, 1}], [0];
@%p1 cp.async.bulk.commit_group;
@%p1 cp.async.bulk.wait_group.read 0;
bar.sync 0;  // sent
st.shared.b32 [%r2], 9;
"""
"""A box of 4 x 16 words is loaded from column -1 and row 1 on, and stored at column 2, row 1."""


def moved(body: str) -> tuple[torch.Tensor, torch.Tensor]:
    given = torch.arange(4 * 20, dtype=torch.int32).view(4, 20)
    out = torch.zeros(4, 20, dtype=torch.int32)
    memory = Memory()
    for n, tensor in enumerate((given, out)):
        values = tensor.view(-1).numpy().view(np.uint32)
        memory.maps[PLACE + 128 * n] = TensorMap(values, [4, 20], [20, 1], [4, 16], 0)
    places = [PLACE, PLACE + 128, 0]
    launch(entry("shl.b32 %r2, %r1, 2;" + body, 64), memory, places, shared=2048)
    return given, out


def test_boxes_are_clipped_and_filled_with_zeros():
    given, out = moved(ENGINE)
    box = torch.zeros(4, 16, dtype=torch.int32)
    box[:3, 1:] = given[1:, :15]
    due = torch.zeros(4, 20, dtype=torch.int32)
    due[1:, 2:18] = (box + 1)[:3]
    assert torch.equal(out, due)


ENGINE_BAD = {
    "barrier not announced": ("bar.sync 0;  // made", "", "without a barrier between"),
    "other phase": ("done, [1024], 0", "done, [1024], 1", "before the copy"),
    "too few bytes": ("[1024], 256", "[1024], 240", "for ever"),
    "too many bytes": ("[1024], 256", "[1024], 272", "for ever"),
    "nothing announced": (
        "mbarrier.arrive.expect_tx.shared.b64 _, [1024], 256",
        "mbarrier.arrive.shared.b64 _, [1024]",
        "before the copy",
    ),
    "store of what may be read": ("bar.sync 0;  // stored", "", "without a barrier"),
    "no proxy fence": ("fence.proxy.async.shared::cta;", "", "proxy fence"),
    "source overwritten": ("@%p1 cp.async.bulk.wait_group.read 0;", "", "may still be read"),
    "store not committed": ("@%p1 cp.async.bulk.commit_group;", "", "may still be read"),
    "nobody knows that it is sent": ("bar.sync 0;  // sent", "", "may still be read"),
    "place not aligned": (" [0],\n", " [16],\n", "aligned to 128"),
}


@pytest.mark.parametrize("name", ENGINE_BAD)
def test_what_tma_would_get_wrong(name):
    old, new, message = ENGINE_BAD[name]
    assert ENGINE.count(old) == 1
    with pytest.raises(Fault, match=message):
        moved(ENGINE.replace(old, new))


MAPS = {
    "strides": ([4, 20], [22, 1], [4, 16], 0),
    "rows must be dense": ([4, 8], [20, 2], [4, 8], 0),
    "256 elements": ([4, 20], [20, 1], [512, 4], 0),
    "multiples of 16 bytes": ([4, 20], [20, 1], [4, 6], 0),
    "fit the swizzle": ([4, 20], [20, 1], [4, 16], 1),
    "sizes must be": ([0, 20], [20, 1], [4, 16], 0),
}


@pytest.mark.parametrize("message", MAPS)
def test_maps_that_the_driver_would_refuse(message):
    with pytest.raises(Fault, match=message):
        TensorMap(np.zeros(200, np.uint32), *MAPS[message])


# wgmma: a is [64, 16], b is [8, 16], both in matrices of 8 x 8 halves without a swizzle.

A = 128 >> 4 << 16 | 256 >> 4 << 32  # 128 bytes along k, 256 along rows, from 0 on
B = A + (2048 >> 4)
PRODUCT = f"""
mad.wide.s32 %rd4, %r1, 16, %rd1;
ld.global.v4.b32 {{ %r10, %r11, %r12, %r13 }}, [ %rd4 + 0 ];
shl.b32 %r2, %r1, 4;
st.shared.v4.b32 [%r2], {{%r10, %r11, %r12, %r13}};
setp.lt.s32 %p1, %r1, 16;
@%p1 ld.global.v4.b32 {{ %r10, %r11, %r12, %r13 }}, [ %rd4 + 2048 ];
@%p1 st.shared.v4.b32 [%r2+2048], {{%r10, %r11, %r12, %r13}};
fence.proxy.async.shared::cta;
bar.sync 0;
add.s32 %r20, 0, 0;
add.s32 %r21, 0, 0;
add.s32 %r22, 0, 0;
add.s32 %r23, 0, 0;
mov.b64 %rd6, {A};
mov.b64 %rd7, {B};
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r20,%r21,%r22,%r23}},
    %rd6, %rd7, 1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
bar.sync 0;  // done
xor.b32 %r3, %r2, 1024;
st.shared.v4.b32 [%r3], {{%r10, %r11, %r12, %r13}};
mad.wide.s32 %rd5, %r1, 16, %rd2;
st.global.v4.b32 [ %rd5 + 0 ], {{ %r20, %r21, %r22, %r23 }};
"""


def multiplied(body: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the program makes of a and b, and what it should."""
    torch.manual_seed(0)
    a, b = torch.randint(-4, 5, (64, 16)).half(), torch.randint(-4, 5, (8, 16)).half()
    tiles = [t.view(-1, 8, 2, 8).permute(0, 2, 1, 3).reshape(-1) for t in (a, b)]
    given, out = torch.cat(tiles), torch.zeros(128, 4)
    memory = Memory()
    values = [memory.add("ab", given), memory.add("d", out), 0]
    launch(entry(body, 128), memory, values, shared=4096)
    due, found = a.double() @ b.double().T, torch.zeros(64, 8).double()
    for thread in range(128):
        warp, group, four = thread // 32, thread % 32 // 4, thread % 4
        for n in range(4):
            found[16 * warp + group + 8 * (n // 2), 2 * four + n % 2] = out[thread, n]
    return found, due


def test_a_product_of_a_warpgroup():
    found, due = multiplied(PRODUCT)
    assert torch.equal(found, due)


PRODUCT_BAD = {
    "no proxy fence": ("fence.proxy.async.shared::cta;", "", "proxy fence"),
    "no barrier": ("bar.sync 0;\nadd", "add", "without a barrier"),
    "no fence of registers": ("wgmma.fence.sync.aligned;", "", "without wgmma.fence"),
    "not waited for": ("wgmma.wait_group.sync.aligned 0;", "", "may still be read|belongs to"),
    "waited for too little": (
        "wait_group.sync.aligned 0",
        "wait_group.sync.aligned 1",
        "may still",
    ),
    "not committed": ("wgmma.commit_group.sync.aligned;", "", "may still be read"),
    "operands overwritten": ("bar.sync 0;  // done", "", "may still be read"),
    "sums read too early": (
        "wgmma.wait_group.sync.aligned 0;",
        "add.f32 %r24, %r20, %r21;",
        "has not been waited for",
    ),
    "part of a warpgroup": (
        "wgmma.commit",
        "setp.lt.s32 %p2, %r1, 32;\n@%p2 wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 "
        "{%r20,%r21,%r22,%r23}, %rd6, %rd7, 1, 1, 1, 0, 0;\nwgmma.commit",
        "part of a warpgroup",
    ),
}


@pytest.mark.parametrize("name", PRODUCT_BAD)
def test_products_that_hardware_would_get_wrong(name):
    old, new, message = PRODUCT_BAD[name]
    assert PRODUCT.count(old) == 1
    with pytest.raises(Fault, match=message):
        multiplied(PRODUCT.replace(old, new))
