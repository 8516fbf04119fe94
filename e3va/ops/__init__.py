"""The ops: one file each (schema, fake, autograd, public function); backends attach to them."""

from e3va.ops.highway_backward import highway
from e3va.ops.patch_merging import patch_merging
from e3va.ops.sublayer_epilogue import sublayer_epilogue
from e3va.ops.window_attention import window_attention

__all__ = ["highway", "patch_merging", "sublayer_epilogue", "window_attention"]
