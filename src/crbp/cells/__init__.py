"""Recurrent cells for images. Each maps a state and a drive to the next state and knows nothing of its gradient."""

from crbp.cells.convgru import ConvGRU
from crbp.cells.convlstm import ConvLSTM
from crbp.cells.gala import GALAHGRU
from crbp.cells.hgru import HGRU

__all__ = ["GALAHGRU", "HGRU", "ConvGRU", "ConvLSTM"]
