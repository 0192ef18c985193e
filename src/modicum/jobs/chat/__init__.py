"""Backends of :class:`modicum.evaluate.chat.ChatModel`: endpoints, local models, scripts, caches."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.jobs.chat.cache import Cached, Recorded
    from modicum.jobs.chat.local import LocalHF
    from modicum.jobs.chat.openai import OpenAICompatible
    from modicum.jobs.chat.scripted import Scripted

__all__ = [
    "Cached",
    "LocalHF",
    "OpenAICompatible",
    "Recorded",
    "Scripted",
]

face(__name__)
