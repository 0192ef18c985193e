"""Judges of answers: from an item to a verdict, one file each."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.evaluate.judges.decision import TypedDecision
    from modicum.evaluate.judges.declines import Declines
    from modicum.evaluate.judges.ensemble import Ensemble
    from modicum.evaluate.judges.harmbench import HarmBenchCls
    from modicum.evaluate.judges.jbb import JBBJudge
    from modicum.evaluate.judges.linear import LinearGuard
    from modicum.evaluate.judges.llama_guard import LlamaGuard3
    from modicum.evaluate.judges.prefix import PrefixRefusal
    from modicum.evaluate.judges.qwen_guard import Qwen3Guard
    from modicum.evaluate.judges.rubric import RubricLLM
    from modicum.evaluate.judges.shield_gemma import ShieldGemma
    from modicum.evaluate.judges.states import StateGuard
    from modicum.evaluate.judges.strongreject import StrongRejectFT, StrongRejectRubric
    from modicum.evaluate.judges.wild_guard import WildGuard
    from modicum.evaluate.judges.xstest import XSTest3Way

__all__ = [
    "Declines",
    "Ensemble",
    "HarmBenchCls",
    "JBBJudge",
    "LinearGuard",
    "LlamaGuard3",
    "PrefixRefusal",
    "Qwen3Guard",
    "RubricLLM",
    "ShieldGemma",
    "StateGuard",
    "StrongRejectFT",
    "StrongRejectRubric",
    "TypedDecision",
    "WildGuard",
    "XSTest3Way",
]

face(__name__)
