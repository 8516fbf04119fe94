"""The ops: one file each (schema, fake, autograd, public function); backends attach to them."""

from e3va.ops.highway import highway
from e3va.ops.stage_exit import stage_exit
from e3va.ops.sublayer_epilogue import sublayer_epilogue
from e3va.ops.window_attention import window_attention

__all__ = ["highway", "stage_exit", "sublayer_epilogue", "window_attention"]
