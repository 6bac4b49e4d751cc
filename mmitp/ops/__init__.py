"""Operators in plain torch: no compiled extension wanted."""

from mmitp.ops.deform_conv import modulated_deform_conv2d

__all__ = ["modulated_deform_conv2d"]
