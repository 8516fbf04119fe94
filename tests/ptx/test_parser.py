"""What stands in the text of a module, and how its blocks are ordered."""

import pytest

from tests.ptx.flow import Flow
from tests.ptx.parser import Instruction, Label, parse

MODULE = """
.version 8.8
.extern .shared .align 16 .b8 pool[]; /* of the launch's
size */
.visible .entry first(
    .param .u64 .ptr .global .align 16 first_param_0,
    .param .align 8 .b8 first_param_1[12],
    .param .f32 first_param_2
)
.reqntid 128
{
    .reg .pred %p<3>; .reg .b32 %r<9>;
    .shared .align 4 .b8 a[6];
    .shared .align 16 .b8 b[32];
    .loc 1 2 3 // a line of the source
$L_START: mov.b32 %r1, 5; // a comment
    {
    .reg .pred done; .reg .b32 %r1;
    again: add.s32 %r1, %r2,
        0f3F800000;
    @!done bra.uni again;
    }
    {
    .reg .pred done;
    again: @done bra again;
    }
    ld.shared.v2.b32 {%r3, %r4}, [%r1+-4];
    .pragma "nounroll";
    ret;
}
.entry second() { ret; }
"""


def test_entries():
    first, second = parse(MODULE).values()
    assert first.threads == 128 and second.threads is None and second.parameters == {}
    assert [tuple(p) for p in first.parameters.values()] == [(0, 8), (8, 12), (20, 4)]
    assert first.shared == {"a": 0, "b": 16} and first.shared_bytes == 48
    assert first.dynamic == {"pool": 16}
    assert first.registers["%p2"] == 1 and first.registers["%r8"] == 32
    assert "%r9" not in first.registers


def test_instructions():
    body = parse(MODULE)["first"].body
    instructions = [s for s in body if isinstance(s, Instruction)]
    labels = [s.name for s in body if isinstance(s, Label)]
    assert [i.opcode for i in instructions] == [
        "mov.b32", "add.s32", "bra.uni", "bra", "ld.shared.v2.b32", "ret"
    ]  # fmt: skip
    assert len(set(labels)) == 3 and labels[0] == "$L_START"
    move, add, again, other, load, _ = instructions
    assert move.where == "line 16: mov.b32 %r1, 5" and add.line == 19
    assert add.operands[0] != "%r1" and add.operands[1:] == ("%r2", "0f3F800000")
    assert again.guard.startswith("!") and again.guard[1:] != other.guard
    assert (again.operands[0], other.operands[0]) == tuple(labels[1:])
    assert load.operands == ("{%r3, %r4}", "[%r1+-4]")


@pytest.mark.parametrize(
    "body, expected",
    [
        # if … else: both before what follows
        ("@%p1 bra B; A: bra.uni C; B: mov.b32 %r1, 1; C: ret;", ["B", "A", "C"]),
        # what a loop leaves to stands before it in the text
        ("bra.uni L; X: ret; L: mov.b32 %r1, 1; @%p1 bra L; bra.uni X;", ["L", "X"]),
        # a loop within a loop, with an exit from the inner one
        (
            "L: mov.b32 %r1, 1; M: @%p1 bra X; @%p2 bra M; N: @%p1 bra L; X: ret;",
            ["L", "M", "N", "X"],
        ),
    ],
)
def test_threads_meet_in_order(body, expected):
    text = f".entry kernel() {{ .reg .pred %p<3>; .reg .b32 %r<3>; {body} }}"
    flow = Flow(parse(text)["kernel"])
    ranks = {name: flow.rank[block] for name, block in flow.labels.items()}
    assert sorted(ranks, key=ranks.get) == expected
    assert sorted(flow.rank) == list(range(len(flow.blocks)))
