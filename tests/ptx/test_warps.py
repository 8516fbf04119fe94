"""Opcodes by which threads work together, against results by hand or by numpy."""

import numpy as np
import pytest

from tests.ptx.snippets import WARP, execute, hexadecimal, lanes

LANE = np.arange(WARP, dtype=np.uint32)


@pytest.mark.parametrize(
    "mode, by, clamp, expected",
    [
        ("bfly", 5, 31, LANE ^ 5),
        ("idx", 9, 31, np.full(WARP, 9)),
        ("up", 3, 0, np.where(LANE < 3, LANE, LANE - 3)),
        ("down", 3, 31, np.where(LANE + 3 > 31, LANE, LANE + 3)),
        ("bfly", 1, 0x1C1F, LANE ^ 1),  # in segments of four
        ("idx", 1, 0x1C1F, LANE // 4 * 4 + 1),
    ],
)
def test_shuffle(mode, by, clamp, expected):
    body = f"shfl.sync.{mode}.b32 %r20|%p1, %r10, {by}, {clamp}, -1; mov.b32 %r21, 0;"
    body += "@%p1 mov.b32 %r21, 1;"
    found, inside = lanes(body, LANE * 7, words=2).T
    assert (found == expected * 7).all()
    if mode in ("up", "down"):
        assert (inside == (expected != LANE)).all()


def test_reduction_and_election():
    body = "redux.sync.add.s32 %r20, %r10, -1; redux.sync.max.u32 %r21, %r10, -1;"
    body += "elect.sync %r22|%p1, -1; selp.b32 %r23, 1, 0, %p1; bar.warp.sync -1;"
    total, largest, _, elected = lanes(body, LANE * 7, words=4).T
    assert (total == 7 * 31 * 16).all() and (largest == 7 * 31).all()
    assert elected[0] == 1 and elected.sum() == 1


def test_vote_at_a_barrier():
    body = "setp.eq.u32 %p1, %r1, 70; bar.red.or.pred %p2, 0, %p1; bar.red.and.pred %p3, 0, %p1;"
    body += "selp.b32 %r20, 1, 0, %p2; selp.b32 %r21, 1, 0, %p3;"
    any_, all_ = lanes(body, np.zeros((128, 1), np.uint32), words=2, threads=128).T
    assert any_.all() and not all_.any()


def test_packing():
    body = "mov.b64 %d1, {%r10, %r11}; shr.u64 %d1, %d1, 16; mov.b64 {%r20, _}, %d1;"
    body += "mov.b32 {%h1, %h2}, %r10; mov.b32 %r21, {%h2, %h1};"
    source = np.array([[0x44332211, 0x88776655]] * WARP, np.uint32)
    assert (lanes(body, source, words=2) == [0x66554433, 0x22114433]).all()


def test_shared_memory_and_predicates():
    """A thread reads what its neighbour of another warp wrote; the odd ones do not."""
    body = """
    mov.b32 %r2, tile;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
    st.shared.b32 [%r4], %r10;
    bar.sync 0;
    xor.b32 %r5, %r4, 128;
    and.b32 %r6, %r1, 1;
    setp.eq.s32 %p1, %r6, 1;
    mov.b32 %r20, 5;
    @%p1 bra DONE;
    ld.shared::cta.b32 %r20, [%r5];
    DONE:
    """
    thread = np.arange(64, dtype=np.uint32)
    found = lanes(body, thread * 3, threads=64, shared=256)[:, 0]
    assert (found == np.where(thread % 2, 5, (thread ^ 32) * 3)).all()


def test_narrow_loads_and_stores():
    body = """
    mov.b32 %r2, tile; shl.b32 %r3, %r1, 2; add.s32 %r2, %r2, %r3;
    st.shared::cta.b16 [%r2], %h1; st.shared.u8 [%r2+2], %r10;
    ld.shared.s8 %r20, [%r2+2]; ld.shared.u8 %r21, [%r2+2];
    """
    found = lanes("mov.b16 %h1, 7;" + body, np.full(WARP, 0xFE, np.uint32), words=2, shared=128)
    assert (found == [0xFFFFFFFE, 0xFE]).all()


def test_loop():
    body = """
    mov.b32 %r20, 0; mov.b32 %r5, 0;
    AGAIN: add.s32 %r20, %r20, %r5; add.s32 %r5, %r5, 1;
    setp.le.s32 %p1, %r5, %r1;
    @%p1 bra.uni AGAIN;
    """
    assert (lanes(body, LANE)[:, 0] == LANE * (LANE + 1) // 2).all()


def test_asynchronous_copy():
    """Of 16 bytes; to odd threads zeros are copied."""
    body = """
    mov.b32 %r2, tile; shl.b32 %r3, %r1, 4; add.s32 %r2, %r2, %r3;
    and.b32 %r4, %r1, 1; setp.eq.s32 %p1, %r4, 1; selp.b32 %r5, 0, 16, %p1;
    cp.async.cg.shared.global [%r2], [%q2], 16, %r5;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.b32 %r20, [%r2+4];
    cp.async.ca.shared.global [%r2], [%q2+4], 4;
    cp.async.wait_all;
    ld.shared.b32 %r21, [%r2];
    """
    source = np.stack([LANE, LANE + 100], 1)
    first, second = lanes(body, source, words=2, shared=512).T
    assert (first == np.where(LANE % 2, 0, LANE + 100)).all() and (second == LANE + 100).all()


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_through_shared_memory(trans):
    """stmatrix, read plainly; then ldmatrix gives back what each lane had."""
    body = f"""
    mov.b32 %r2, tile; shl.b32 %r3, %r1, 4; add.s32 %r2, %r2, %r3;
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r2], {{%r10, %r11, %r12, %r13}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r2];
    ld.shared.v4.b32 {{%r24, %r25, %r26, %r27}}, [%r2];
    """
    source = np.arange(WARP * 8, dtype=np.uint16).reshape(WARP, 8)
    found = lanes(body, source, words=8, shared=512)
    assert (found[:, :4] == source.view(np.uint32)).all()
    rows = np.ascontiguousarray(found[:, 4:]).view(np.uint16)  # of matrix i: 8i …
    for i in range(4):
        for g in range(8):
            for t in range(4):
                pair = source[4 * g + t, 2 * i : 2 * i + 2]
                matrix = rows[8 * i : 8 * i + 8]
                place = matrix[2 * t : 2 * t + 2, g] if trans else matrix[g, 2 * t : 2 * t + 2]
                assert (place == pair).all()


def bits16(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind, depth", [("f16", 8), ("f16", 16), ("bf16", 16)])
def test_tensor_core(kind, depth):
    """Fragments lie as csrc/cuda/tensor_cores.cuh says. Small integers: nothing is rounded."""
    random = np.random.default_rng(0)
    a, b, c = (random.integers(-8, 9, n) for n in ((16, depth), (depth, 8), (16, 8)))
    A, B = bits16(a, kind), bits16(b, kind)
    rows = [[] for _ in range(WARP)]
    for lane, row in enumerate(rows):
        g, t = divmod(lane, 4)
        for half in range(depth // 8):
            row += [*A[g, 8 * half + 2 * t :][:2], *A[g + 8, 8 * half + 2 * t :][:2]]
    left = ", ".join(f"%r{10 + i}" for i in range(depth // 4))
    # b and c come as constants, one lane after the other.
    body = "mov.b32 %r30, 0; mov.b32 %r31, 0;" + "".join(
        f"mov.f32 %f{i + 1}, 0f00000000;" for i in range(4)
    )
    for lane in range(WARP):
        g, t = divmod(lane, 4)
        body += f"setp.eq.u32 %p1, %r1, {lane};"
        for half in range(depth // 8):
            low, high = (int(v) for v in B[8 * half + 2 * t :, g][:2])
            body += f"@%p1 mov.b32 %r{30 + half}, {low | high << 16};"
        for i, (row, column) in enumerate([(g, 0), (g, 1), (g + 8, 0), (g + 8, 1)]):
            value = hexadecimal(np.float32(c[row, 2 * t + column]))
            body += f"@%p1 mov.b32 %f{i + 1}, {value};"
    right = ", ".join(f"%r{30 + i}" for i in range(depth // 8))
    body += f"""
    mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32
        {{%f5, %f6, %f7, %f8}}, {{{left}}}, {{{right}}}, {{%f1, %f2, %f3, %f4}};
    """ + "".join(f"mov.b32 %r{20 + i}, %f{5 + i};" for i in range(4))
    found = lanes(body, np.array(rows, np.uint16), words=4).view(np.float32)
    expected = a @ b + c
    for lane in range(WARP):
        g, t = divmod(lane, 4)
        for half in range(2):
            assert (found[lane, 2 * half :][:2] == expected[g + 8 * half, 2 * t :][:2]).all()


@pytest.mark.parametrize("swizzle", [0, 128])
def test_tensor_core_of_four_warps(swizzle):
    """wgmma of a [64, 16] and b [16, 8] in shared memory, by rows and by columns: of 16 values, as
    matrices of 8 × 8, or in rows of 128 bytes whose pieces of 16 are exchanged."""
    random = np.random.default_rng(0)
    a, b = (random.integers(-8, 9, n) for n in ((64, 16), (16, 8)))
    tile = np.zeros(16384, np.uint16)
    for matrix, start in ((a, 0), (b.T, 8192)):
        for row in range(len(matrix)):
            for k in range(16):
                if swizzle:
                    piece = k // 8 ^ row % 8
                    at = row * 128 + piece * 16 + k % 8 * 2
                else:
                    at = row // 8 * 256 + k // 8 * 128 + row % 8 * 16 + k % 8 * 2
                tile[(start + at) // 2] = bits16(matrix[row, k], "f16")
    leading, stride = (1, 1024 >> 4) if swizzle else (128 >> 4, 256 >> 4)
    description = leading << 16 | stride << 32 | (1 << 62 if swizzle else 0)
    copy = "".join(
        f"ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%q2+{at}];"
        f"st.shared.v4.b32 [%r6+{at}], {{%r2, %r3, %r4, %r5}};"
        for at in range(0, 16384, 2048)
    )
    body = f"""
    mov.b32 %r6, tile; shl.b32 %r7, %r1, 4; add.s32 %r6, %r6, %r7;
    {copy}
    bar.sync 0;
    fence.proxy.async.shared::cta;
    wgmma.fence.sync.aligned;
    mov.b64 %d1, {description}; add.s64 %d2, %d1, {8192 >> 4};
    mov.pred %p1, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {{%f1, %f2, %f3, %f4}}, %d1, %d2, %p1, 1, 1, 0, 0;
    mov.pred %p1, 1;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {{%f1, %f2, %f3, %f4}}, %d1, %d2, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    shl.b32 %r7, %r1, 4; cvt.u64.u32 %q4, %r7; add.s64 %q4, %q1, %q4;
    st.global.v4.f32 [%q4], {{%f1, %f2, %f3, %f4}};
    """
    out = np.zeros((128, 4), np.float32)
    found = execute(body, tile, out, threads=128, shared=16384)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        g, t = divmod(lane, 4)
        for half in range(2):
            row = 16 * warp + g + 8 * half
            assert (found[thread, 2 * half :][:2] == 2 * (a @ b)[row, 2 * t :][:2]).all()


def test_tensor_memory():
    """a [64, 16] in tensor memory, times b [16, 8] in shared memory, twice; four warps."""
    random = np.random.default_rng(0)
    a, b = (random.integers(-8, 9, n) for n in ((64, 16), (16, 8)))
    source = np.zeros((128, 16), np.uint8)
    # Row 16w + i of a: lanes i (first half of the columns) and 16 + i of warp w.
    pieces = bits16(a, "bf16").reshape(4, 16, 2, 8).transpose(0, 2, 1, 3)
    source[:] = np.ascontiguousarray(pieces).view(np.uint8).reshape(128, 16)
    tile = np.zeros((2, 8, 8), np.uint16)  # of b: k // 8, column, k % 8
    for k in range(16):
        tile[k // 8, :, k % 8] = bits16(b[k], "bf16")
    fill = "".join(
        f"mov.b32 %r2, {int(word)}; st.shared.b32 [tile+{64 + 4 * i}], %r2;"
        for i, word in enumerate(tile.view(np.uint32).ravel())
    )
    description = (
        1 << 46 | (128 >> 4) << 16 | (256 >> 4) << 32
    )  # matrices of 8 × 8, 128 bytes apart
    formats = 1 << 4 | 1 << 7 | 1 << 10 | (8 >> 3) << 17 | (64 >> 4) << 24
    body = f"""
    setp.lt.u32 %p1, %r1, 32;
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [tile], 32;
    @%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    setp.eq.u32 %p2, %r1, 0;
    @%p2 mbarrier.init.shared::cta.b64 [tile+8], 1;
    @%p2 bra FILL;
    bra.uni FILLED;
    FILL: {fill}
    FILLED: bar.sync 0;
    ld.shared.b32 %r3, [tile];
    shr.u32 %r4, %r1, 5; shl.b32 %r4, %r4, 21; add.s32 %r4, %r4, %r3;
    tcgen05.st.sync.aligned.16x32bx2.x4.b32 [%r4+16], 4, {{%r10, %r11, %r12, %r13}};
    tcgen05.wait::st.sync.aligned;
    mov.b32 %r5, tile; add.s32 %r5, %r5, 64; shr.u32 %r5, %r5, 4;
    cvt.u64.u32 %d1, %r5; or.b64 %d1, %d1, {description};
    add.s32 %r6, %r3, 16;
    mov.pred %p3, 0;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p2 tcgen05.mma.cta_group::1.kind::f16 [%r3], [%r6], %d1, {formats}, %p3;
    mov.pred %p3, 1;
    @%p2 tcgen05.mma.cta_group::1.kind::f16 [%r3], [%r6], %d1, {formats}, %p3;
    @%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [tile+8];
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p4, [tile+8], 0;
    @!%p4 bra.uni WAIT;
    tcgen05.ld.sync.aligned.16x32bx2.x4.b32 {{%r20, %r21, %r22, %r23}}, [%r4], 4;
    tcgen05.wait::ld.sync.aligned;
    bar.sync 0;
    @%p2 mbarrier.inval.shared::cta.b64 [tile+8];
    @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 32;
    """
    found = lanes(body, source, words=4, threads=128, shared=1024).view(np.float32)
    expected = (2 * (a @ b)).reshape(4, 16, 2, 4).transpose(0, 2, 1, 3).reshape(128, 4)
    assert (found == expected).all()
