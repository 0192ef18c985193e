"""Kinds of rows, one file each: the fields of a row, and the tokens that are learned from it.

A kind is a function ``(section, row, index) -> row`` that reads a row of a source, under the source's field names, and
returns it under ours, checked. Its facts say which fields tell the kind, and how its rows become token ids and labels.

===============  ===================================================================================================
``text``         ``{"text": str}``
``chat``         ``{"messages": [{"role": …, "content": …}, …]}``
``completion``   ``{"prompt": str, "completion": str}``
``preference``   ``{"prompt": str, "chosen": str, "rejected": str}``, or ``messages`` in place of the prompt
``contrast``     ``{"prompt": str, "completion": str, "kind": "illegal" or "helpful", "rejected": str or None}``
``choice``       ``{"prompt": str, "choices": [str, …], "answer": int}``
``instruction``  ``{"prompt": str, "checks": [{"kind": str, …}, …]}``; asked by evaluations
``question``     ``{"prompt": str, "answers": [str, …]}``, none for an unanswerable one; asked by evaluations
``request``      ``{"prompt": str, "harmful": bool}``; asked by evaluations
===============  ===================================================================================================
"""
