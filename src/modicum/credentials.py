"""Keys, tokens and passwords by their looks: recipes that hold one are refused, and none reaches a record or a page.

The shapes are those that the services document for their own secret scanning. What has no shape of its own is known by
the name that it stands under.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from modicum.errors import shortened

HIDDEN = "(hidden)"
SCANNED = 200_000  # letters of a text that are looked through; longer ones lose their middle
# What it looks like, and the variable in which the service's own tools look for it.
SHAPES: Mapping[str, str] = MappingProxyType(
    {
        r"\bhf_(?:oauth_)?[A-Za-z0-9]{16,}": "HF_TOKEN",
        r"\bhf_jwt_[A-Za-z0-9._-]{16,}": "HF_TOKEN",
        r"\bapi_org_[A-Za-z0-9]{16,}": "HF_TOKEN",
        r"\bsk-ant-[A-Za-z0-9_-]{16,}": "ANTHROPIC_API_KEY",
        r"\bsk-[A-Za-z0-9_-]{16,}": "OPENAI_API_KEY",
        r"\bgh[opsur]_[A-Za-z0-9]{20,}": "GITHUB_TOKEN",
        r"\bgithub_pat_[A-Za-z0-9_]{20,}": "GITHUB_TOKEN",
        r"\bgl(?:pat|dt|rt|cbt|ptt|ft|soat|agent|imt|ffct)-[A-Za-z0-9_-]{16,}": "GITLAB_TOKEN",
        r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b": "AWS_ACCESS_KEY_ID",
        r"\bnvapi-[A-Za-z0-9_-]{20,}": "NVIDIA_API_KEY",
        r"\bAIza[A-Za-z0-9_-]{35}": "GOOGLE_API_KEY",
        r"\bya29\.[A-Za-z0-9_-]{20,}": "GOOGLE_API_KEY",
        r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}": "SLACK_TOKEN",
        r"\bnpm_[A-Za-z0-9]{30,}": "NPM_TOKEN",
        r"\bpypi-[A-Za-z0-9_-]{40,}": "PYPI_TOKEN",
        r"\bglsa_[A-Za-z0-9_]{20,}": "GRAFANA_TOKEN",
        r"\br8_[A-Za-z0-9]{30,}": "REPLICATE_API_TOKEN",
        r"\bgsk_[A-Za-z0-9]{30,}": "GROQ_API_KEY",
        r"\b(?:xai|pplx)-[A-Za-z0-9]{20,}": "a variable of its own",
        r"\b(?:wandb|tgp|dop|doo|dor)_v1_[A-Za-z0-9_-]{20,}": "a variable of its own",
        r"\bdckr_(?:pat|oat)_[A-Za-z0-9_-]{20,}": "a variable of its own",
        r"\bhv[sb]\.[A-Za-z0-9_-]{20,}": "VAULT_TOKEN",
        r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}": "STRIPE_API_KEY",
        r"\b[0-9]{8,10}:AA[A-Za-z0-9_-]{30,}": "a variable of its own",
        r"\bhooks\.slack\.com/services/[A-Za-z0-9/_-]{10,}": "a variable of its own",
        r"\bdiscord(?:app)?\.com/api/webhooks/[0-9]+/[A-Za-z0-9_-]{16,}": "a variable of its own",
        r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}": "a variable of its own",
        r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[\s\S]*?(?=-----END|\Z)": "a file of its own",
        r"(?i)(?<=\bbearer )[A-Za-z0-9._~+/=-]{12,}": "a variable of its own",
        r"(?i)\b(?:authorization\W{1,5}(?:basic|token)\s+|x-api-key\W{1,5})[^\s,;'\"]{6,}": "a variable of its own",
        r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)": "a variable, or git's credential store",
        r"(?<=://)[^/\s:@]{12,}(?=@)": "a variable, or git's credential store",
        r"(?i)(?<=[?&;#])(?:[\w-]{0,40}(?:token|secret|signature|password|key)|sig|pwd)=[^&\s]{6,}": "a variable",
        r"\b[A-Z][A-Z0-9_]*_(?:TOKEN|KEY|SECRET|PASSWORD)['\"]?\s*[=:]\s*['\"]?[^\s,;'\"]{6,}": "that variable itself",
        r"(?i)\b\w{0,40}(?:secret_access_key|access_token|auth_token|api_key|client_secret|private_key)['\"]?\s*[=:]"
        r"\s*['\"]?[^\s,;'\"]{6,}": "a variable of its own",
    }
)
# A file's name may join a key to other words by an underscore, which is a letter to \b.
_FOUND = {re.sub(r"^((?:\(\?i\))?)\\b", r"\1(?<![^\\W_])", shape): variable for shape, variable in SHAPES.items()}
_ANY = re.compile("|".join(f"(?:{shape})" for shape in _FOUND if not shape.startswith("(?i)")))
_ANY_CASE = re.compile("|".join(f"(?:{shape[4:]})" for shape in _FOUND if shape.startswith("(?i)")), re.IGNORECASE)
_KEY = re.compile(
    r"(?i)(password|passwd|passphrase|secret|authorization|credentials?|(api|access|private|secret|encryption)[-_]?key)$"
    r"|^(?i:pwd|bearer|(?:set-)?cookie)$|(?i:^|_)(?i:wandb|openai|anthropic|hf|aws|azure|google)_?(?i:key)$"
    r"|(^|_)(hub|auth|access|api|hf|bearer|refresh|session|github|gitlab)?_?token$|_(TOKEN|KEY|SECRET)$"
)
_NOT_KEY = re.compile(r"(?i)(mask|pad|eos|bos|unk|sep|cls|image|audio|video|special|stop|start|end)_token$")


def is_secret_name(name: str) -> bool:
    """Whether what stands under this name is a secret.

    Example:
        >>> [is_secret_name(name) for name in ("hub_token", "API_KEY", "mask_token", "tokens", "monkey")]
        [True, True, False, False, False]
    """
    return bool(_KEY.search(name)) and not _NOT_KEY.search(name)


def _hides(value: Mapping[Any, Any], key: object) -> bool:
    """Whether a mapping holds a secret under ``key``; a token of a tokenizer's vocabulary is none."""
    return is_secret_name(str(key)) and not (key == "token" and value.get("kind") == "model_token")


def redact(value: Any, *, names: bool = True) -> Any:
    """Return JSON-like ``value`` with whatever looks like a key or password hidden.

    Args:
        value: The value.
        names: Hide also what stands under the name of a secret, whatever it looks like.

    Example:
        >>> redact({"hub_token": "x", "mask_token": "<m>", "error": "at https://me:pw@host"})
        {'hub_token': '(hidden)', 'mask_token': '<m>', 'error': 'at https://(hidden)@host'}
    """
    if isinstance(value, Mapping):
        hidden = {key for key, item in value.items() if names and item not in (None, "") and _hides(value, key)}
        return {redact(key): HIDDEN if key in hidden else redact(item, names=names) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, names=names) for item in value]
    if not isinstance(value, str):
        return value
    value = shortened(value, SCANNED)  # patterns take seconds on texts that nobody reads
    return _ANY_CASE.sub(HIDDEN, _ANY.sub(HIDDEN, value))


def secrets_in(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield where JSON-like ``value`` holds a secret, and which variable should hold it instead.

    Example:
        >>> list(secrets_in({"trainer": {"hub_token": "x"}, "eos_token": "</s>"}))
        [('trainer.hub_token', 'HF_TOKEN')]
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            place = redact(f"{where}.{key}".lstrip("."))
            if (variable := _variable(str(key))) is not None:
                yield place, variable
            elif _is_said(item) and _hides(value, key):
                ordinary = "HF_TOKEN" if "hub" in str(key) else "a variable of the environment"
                yield place, _variable(str(item)) or ordinary
            else:
                yield from secrets_in(item, place)
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield from secrets_in(item, f"{where}.{position}".lstrip("."))
    elif isinstance(value, str) and (variable := _variable(value)) is not None:
        yield where, variable


def _is_said(value: object) -> bool:
    """Whether a value could be a password: a text, a long number, or a list with one of them."""
    if isinstance(value, list | tuple):
        return any(map(_is_said, value))
    return (isinstance(value, str) and value != "") or (type(value) is int and value >= 100_000)


def _variable(text: str) -> str | None:
    return next((name for shape, name in _FOUND.items() if re.search(shape, text)), None)
