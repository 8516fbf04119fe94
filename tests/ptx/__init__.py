"""The compiled kernels, executed on a CPU: a SIMT interpreter of PTX and the tests that use it.

    parser.py       PTX as text → entries of instructions
    flow.py         basic blocks, and the order in which threads that diverged meet again
    floats.py       the float formats and their roundings
    opcodes.py      the table of opcodes: what one thread does
    warps.py        … and what a warp does together: shuffles, matrices, tensor cores
    memory.py       global and shared memory, and the checks of every access
    counters.py     what an execution counts
    machine.py      launches an entry: threads, barriers, schedules
    compiler.py     Triton's and nvcc's PTX
    device.py       lets the launchers of ``e3va.kernels`` run on the machine

All but the last two need numpy alone.
"""
