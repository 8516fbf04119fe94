"""The compiled kernels, executed on a CPU: a SIMT interpreter of PTX and the tests that use it.

    parser.py            PTX as text → entries of instructions
    flow.py              basic blocks, and the order in which threads that diverged meet again
    floats.py            the float formats and their roundings
    opcodes.py           the table of opcodes
    arithmetic.py  accesses.py   what one thread does
    warps.py             … what a warp does together: shuffles, matrices, tensor cores
    tensor_memory.py     … and the tensor cores of sm_100
    memory.py            global and shared memory, and the checks of every access
    counters.py          what an execution counts
    machine.py           launches an entry: threads, barriers, schedules
    compiler.py          Triton's and nvcc's PTX
    device.py            lets the launchers of ``e3va.kernels`` run on the machine
    window_attention.py  launches the CUDA kernels
    costs.py             what the kernels cost: ``python -m tests.ptx.costs``

All but the last four need numpy alone. In force on every run: bounds, alignment, reads of what
nobody wrote, writes to inputs, two blocks that write one byte, races of warps in shared memory,
asynchronous copies included, divergence at what a warp does together, deadlock.

Nothing here lists kernels or their arguments: what is launched how is read from the launchers. What
an execution cost is counted on request, see :mod:`tests.ptx.counters`: by

    with Device(compiler, architecture=80, counted=True) as device:
        sublayer_epilogue(x, y, ...)
    device.counts["sublayer_epilogue_kernel"].classes()

or, of every kernel at one shape, :func:`tests.ptx.costs.measure`.

``pytest tests/ptx`` takes some three minutes of one core, ``pytest tests/ptx -m long`` hours: every
kernel for every architecture, dtype and way to keep taps.
"""
