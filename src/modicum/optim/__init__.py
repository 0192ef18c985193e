"""Gradient rules and zeroth-order optimizers."""

from modicum.optim.adagc import AdaGC
from modicum.optim.conmezo import ConMeZO
from modicum.optim.fzoo import FZOO
from modicum.optim.hizoo import HiZOO
from modicum.optim.lozo import LOZO
from modicum.optim.mezo import MeZO
from modicum.optim.sparse_mezo import SparseMeZO
from modicum.optim.subzero import SubZero
from modicum.optim.tezo import TeZO
from modicum.optim.zo_adamu import ZOAdaMU

__all__ = ["FZOO", "LOZO", "AdaGC", "ConMeZO", "HiZOO", "MeZO", "SparseMeZO", "SubZero", "TeZO", "ZOAdaMU"]
