"""Backends of :class:`modicum.evaluate.chat.ChatModel`: endpoints, local models, scripts, caches."""
