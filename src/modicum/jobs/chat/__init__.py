"""Backends of :class:`modicum.evaluate.chat.ChatModel`: endpoints, local models, scripts, caches."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.jobs.chat.cache import Cached, Recorded
    from modicum.jobs.chat.decoding import Guarded, LessThink, MoreThink, ZeroThink
    from modicum.jobs.chat.local import LocalHF
    from modicum.jobs.chat.openai import OpenAICompatible
    from modicum.jobs.chat.scripted import Scripted
    from modicum.jobs.chat.vllm import VLLMOffline

__all__ = [
    "Cached",
    "Guarded",
    "LessThink",
    "LocalHF",
    "MoreThink",
    "OpenAICompatible",
    "Recorded",
    "Scripted",
    "VLLMOffline",
    "ZeroThink",
]

face(__name__)
