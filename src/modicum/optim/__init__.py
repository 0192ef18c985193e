"""Gradient rules and zeroth-order optimizers."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.optim.gradient.adagc import AdaGC
    from modicum.optim.zeroth_order.conmezo import ConMeZO
    from modicum.optim.zeroth_order.fzoo import FZOO
    from modicum.optim.zeroth_order.hizoo import HiZOO
    from modicum.optim.zeroth_order.lozo import LOZO
    from modicum.optim.zeroth_order.mezo import MeZO
    from modicum.optim.zeroth_order.sparse_mezo import SparseMeZO
    from modicum.optim.zeroth_order.subzero import SubZero
    from modicum.optim.zeroth_order.tezo import TeZO
    from modicum.optim.zeroth_order.zo_adamu import ZOAdaMU

__all__ = ["FZOO", "LOZO", "AdaGC", "ConMeZO", "HiZOO", "MeZO", "SparseMeZO", "SubZero", "TeZO", "ZOAdaMU"]

face(__name__)
