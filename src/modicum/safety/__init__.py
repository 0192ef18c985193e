"""Safety in one place: measure refusals best of N, make data of safety reasoning, train on it.

Everything here lives elsewhere, by its kind (see ``docs/guide/safety.md``); this is where to import it from.
"""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.evaluate.best_of_n import (
        BestOfNReport,
        asr_all,
        asr_all_from_first_safe,
        asr_any,
        best_of_n_report,
        refusal_rate,
        strongreject_score,
    )
    from modicum.evaluate.calibration import calibrate, rogan_gladen, rogan_gladen_deviation
    from modicum.evaluate.chat import (
        Attack,
        AttackedPrompt,
        ChatModel,
        ChatRequest,
        ChatResult,
        Choice,
        GenParams,
        Goal,
        Judge,
        JudgeItem,
        Usage,
        Verdict,
    )
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
    from modicum.jobs.chat.cache import Cached, Recorded
    from modicum.jobs.chat.decoding import Guarded, LessThink, MoreThink, ZeroThink
    from modicum.jobs.chat.local import LocalHF
    from modicum.jobs.chat.openai import OpenAICompatible
    from modicum.jobs.chat.scripted import Scripted
    from modicum.jobs.chat.vllm import VLLMOffline
    from modicum.jobs.safety.measuring import evaluate
    from modicum.jobs.training.reasoning import SRGDataCollator, SRGTrainer

__all__ = [
    "Attack",
    "AttackedPrompt",
    "BestOfNReport",
    "Cached",
    "ChatModel",
    "ChatRequest",
    "ChatResult",
    "Choice",
    "Declines",
    "Ensemble",
    "GenParams",
    "Goal",
    "Guarded",
    "HarmBenchCls",
    "JBBJudge",
    "Judge",
    "JudgeItem",
    "LessThink",
    "LinearGuard",
    "LlamaGuard3",
    "LocalHF",
    "MoreThink",
    "OpenAICompatible",
    "PrefixRefusal",
    "Qwen3Guard",
    "Recorded",
    "RubricLLM",
    "SRGDataCollator",
    "SRGTrainer",
    "Scripted",
    "ShieldGemma",
    "StateGuard",
    "StrongRejectFT",
    "StrongRejectRubric",
    "TypedDecision",
    "Usage",
    "VLLMOffline",
    "Verdict",
    "WildGuard",
    "XSTest3Way",
    "ZeroThink",
    "asr_all",
    "asr_all_from_first_safe",
    "asr_any",
    "best_of_n_report",
    "calibrate",
    "evaluate",
    "refusal_rate",
    "rogan_gladen",
    "rogan_gladen_deviation",
    "strongreject_score",
]

face(__name__)
