"""What runs the ops: ``reference`` is PyTorch, ``native`` the compiled C++/CUDA extension,
``triton`` the kernels in ``kernels/``. Each attaches its functions to the ops when imported."""

from e3va.ops.backends import native as native
from e3va.ops.backends import reference as reference
from e3va.ops.backends import triton as triton
