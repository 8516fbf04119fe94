"""The ways to tune a backbone: one file a method, and one line here. Their order is that of every
list and table of them."""

# isort: off
from e3va.methods import full as full
from e3va.methods import frozen as frozen
from e3va.methods import bitfit as bitfit
from e3va.methods import norm as norm
from e3va.methods import partial1 as partial1
from e3va.methods import adapter as adapter
from e3va.methods import adaptformer as adaptformer
from e3va.methods import lora as lora
from e3va.methods import lorand as lorand
from e3va.methods import mona as mona
from e3va.methods import e3va as e3va
# isort: on

from e3va.methods.e3va import HIGHWAYS, E3VABackbone
from e3va.methods.registry import METHODS, Method, build_backbone, options_of, register_method

__all__ = [
    "HIGHWAYS",
    "METHODS",
    "E3VABackbone",
    "Method",
    "build_backbone",
    "options_of",
    "register_method",
]
