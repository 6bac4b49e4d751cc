"""The channel graph of a model: who reads whose channels, found by one recorded forward pass.

``records`` holds what comes out: layers, nodes (channels) and their edges. ``recorder`` runs the pass. ``labels`` keeps
track of which channels the elements of each tensor belong to. ``ops`` is the table of what each torch function does to
them; :func:`register_op` adds to it.
"""

from .labels import Labels
from .ops import Call, channelwise, elementwise, register_op
from .recorder import record_graph, shared_parameters
from .records import ChannelGraph, LayerCall, LayerRecord

__all__ = [
    "Call",
    "ChannelGraph",
    "Labels",
    "LayerCall",
    "LayerRecord",
    "channelwise",
    "elementwise",
    "record_graph",
    "register_op",
    "shared_parameters",
]
