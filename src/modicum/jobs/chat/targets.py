"""The sections of a recipe that name a model to talk to, and a judge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator

from modicum import registry
from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.calibration import Calibration, calibrate
from modicum.evaluate.chat import THINK, ChatModel, ChatRequest, GenParams, Judge, JudgeItem, Verdict
from modicum.evaluate.judging import unjudged
from modicum.jobs.safety.prompts import guideline_text, load_guidelines
from modicum.recipe import Section
from modicum.schema import explain
from modicum.types import NonNegativeInt, Positive, PositiveInt

if TYPE_CHECKING:
    from modicum.evaluate.chat import Goal
    from modicum.jobs.chat.openai import OpenAICompatible
    from modicum.jobs.safety.suites import Suite


class Target(Section):
    """A model on this machine, or one behind an endpoint."""

    alone: ClassVar[str | None] = "model"
    model: str | None = Field(default=None, description="folder, Hub id or builtin")
    endpoint: str | None = Field(default=None, description="address of an OpenAI-compatible server, up to /v1")
    name: str | None = Field(default=None, description="the model's name at the endpoint")
    api_key_env: str | None = Field(default=None, description="environment variable that holds the endpoint's key")
    allow_remote: bool = Field(default=False, description="allow an endpoint on another machine")
    concurrency: PositiveInt = Field(default=16, description="most requests to the endpoint at a time")
    timeout: Positive = Field(default=120.0, description="seconds to wait for one answer of the endpoint")
    retries: NonNegativeInt = Field(
        default=5, description="how often a request to the endpoint is sent again after a failure"
    )
    thinking: Literal["own", "zero", "less", "more"] = Field(
        default="own", description="zero, less or more reasoning than the model's own, of models that reason in tags"
    )
    tags: tuple[str, str] = Field(default=THINK, description="how the model's reasoning opens and closes")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="further fields of requests to the endpoint")
    guidelines: str | bool = Field(
        default=False, description="true, or a file: the guidelines stand before every conversation as system message"
    )
    batch_size: PositiveInt = Field(default=32, description="samples at a time of a model on this machine")
    dtype: str = Field(default="float32", description="of the weights of a model on this machine")
    device: str = Field(default="cpu", description="where a model on this machine computes, for example cuda")
    remote_code: bool = False

    @model_validator(mode="after")
    def _is_one(self) -> Target:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("expected `model`, or `endpoint` with `name`, and not both")
        if self.endpoint is not None and self.name is None:
            raise ValueError("an endpoint needs the `name` of its model")
        if self.extra_body and self.endpoint is None:
            raise ValueError("extra_body is sent to an endpoint, and the model is on this machine; leave it out")
        if len({tag.strip() for tag in self.tags} - {""}) != 2:
            raise ValueError(f"tags is {list(self.tags)}, expected two different texts")
        if self.endpoint is not None and self.thinking != "own":
            raise ValueError(
                f"thinking: {self.thinking} begins the answer for the model, which an endpoint cannot go on with"
            )
        return self

    def inputs(self) -> Iterator[str]:
        """Yield the model and the guidelines."""
        if self.model is not None:
            yield self.model
        if isinstance(self.guidelines, str):
            yield self.guidelines

    @property
    def called(self) -> str:
        """The name under which its chat model draws."""
        own = self.model or f"{self.name}@{urlsplit(self.endpoint or '').netloc}"
        return own if self.thinking == "own" else f"{own}+{self.thinking}_think"

    @property
    def system(self) -> str | None:
        """The guidelines as a system message, where the target has them."""
        if self.guidelines is False:
            return None
        return guideline_text(load_guidelines(None if self.guidelines is True else self.guidelines))


def open_target(target: Target, *, progress: Any = lambda _: None, sampled: bool = True) -> ChatModel:
    """Return the chat model that a recipe names, thinking as it says; one behind an endpoint is probed.

    Args:
        target: The section.
        progress: Told of finished samples.
        sampled: Whether several answers to one request are wanted. Who is asked greedily alone, such as a judge, is
            only looked for.

    Raises:
        ModicumError: It cannot be loaded or reached, or think so.
    """
    from modicum.jobs.chat.decoding import LessThink, MoreThink, ZeroThink

    model = _opened(target, progress, sampled)
    kinds = {"zero": ZeroThink, "less": LessThink, "more": MoreThink}
    return kinds[target.thinking](model, tags=target.tags) if target.thinking in kinds else model


def look_at(target: Target, asked: Sequence[ChatRequest] = ()) -> None:
    """Refuse what opening and asking a target would refuse, as far as can be told without its weights or a server.

    Args:
        target: The section.
        asked: What it will be asked, but for its guidelines.

    Raises:
        ModicumError: Its address, key, guidelines, folder, tokenizer, dtype or device cannot be used; or a model on
            this machine has no positions for a request and its answer.
    """
    system = target.system  # reads the guidelines
    if target.endpoint is not None:
        _client(target)
        return
    from modicum.jobs.chat.local import LocalHF, need_template
    from modicum.jobs.loading.models import load_tokenizer, rehearse_model, usable

    reference = target.model or ""
    usable(target.dtype, target.device)
    tokenizer = load_tokenizer(reference, remote_code=target.remote_code)
    need_template(tokenizer, reference)
    local = LocalHF(rehearse_model(reference, remote_code=target.remote_code), tokenizer, reference)
    local.check_room(request.under(system) for request in asked)


def look_at_judge(section: JudgeSection) -> None:
    """Refuse what opening a judge would refuse, as :func:`look_at`.

    Raises:
        ModicumError: Its knobs or the model that it asks cannot be used.
    """
    entry = registry.judge[section.name]
    knobs = entry.knobs(section.knobs)
    if section.backend is None:
        entry.function(**knobs)
        return
    entry.function(None, **knobs)
    look_at(section.backend)


def look_at_all(
    suites: Iterable[Suite],
    requests: Sequence[Sequence[Goal]],
    targets: Iterable[Target],
    judge: JudgeSection | None,
    *,
    params: GenParams | None,
) -> None:
    """Refuse what hours of drawing would end with: wrappers, targets and a judge that cannot be used.

    Args:
        suites: Those that a model writes are tried when it is there.
        requests: Harmful and harmless ones, to try the wrappers on.
        targets: All models that are asked these.
        judge: Its section, if there is one.
        params: Of the answers; ``None`` where nothing is answered.

    Raises:
        ModicumError: One of them cannot be used.
    """
    asked = [
        ChatRequest(prompt.messages, params or GenParams())
        for suite in suites
        for part in (() if suite.needs_model else requests)
        for prompt in suite.wrap(suite.attack.name, part, None)
    ]
    for target in targets:
        look_at(target, asked if params is not None else ())
    if judge is not None:
        look_at_judge(judge)


def _client(target: Target, progress: Any = lambda _: None) -> OpenAICompatible:
    from modicum.jobs.chat.openai import OpenAICompatible

    return OpenAICompatible(
        target.endpoint or "",
        target.name or "",
        api_key_env=target.api_key_env,
        concurrency=target.concurrency,
        timeout=target.timeout,
        retries=target.retries,
        allow_remote=target.allow_remote,
        extra_body=target.extra_body,
        tags=target.tags,
        progress=progress,
    )


def _opened(target: Target, progress: Any, sampled: bool) -> ChatModel:
    if target.endpoint is not None:
        client = _client(target, progress)
        if sampled:
            client.probe()
        else:
            client.reach()
        return client
    from modicum.jobs.chat.local import LocalHF
    from modicum.jobs.loading.models import load_model, load_tokenizer

    reference = target.model or ""
    model = load_model(reference, dtype=target.dtype, device=target.device, remote_code=target.remote_code)
    tokenizer = load_tokenizer(reference, remote_code=target.remote_code)
    return LocalHF(model, tokenizer, name=reference, batch_size=target.batch_size, progress=progress, tags=target.tags)


class JudgeSection(Section):
    """Who tells harm, and who tells refusal."""

    alone: ClassVar[str | None] = "name"
    name: str = Field(
        default="linear", description="a judge; linear learns from labelled answers in installed packages"
    )
    backend: Target | None = Field(default=None, description="the model that a judge asks")
    knobs: dict[str, Any] = Field(default_factory=dict, description="knobs of the judge")
    calibrate: NonNegativeInt = Field(
        default=0,
        description="labelled answers on which a judge of a model is measured first, half of them harmful; attack "
        "success is corrected for the errors then",
    )
    refusal: Literal["declines", "evasion", "prefix"] = Field(
        default="declines",
        description="who tells refusals where the judge does not, approximately: how first clauses begin, these or no "
        "word in common with the goal, or first words",
    )

    @model_validator(mode="after")
    def _fits(self) -> JudgeSection:
        if self.name == "ensemble":
            raise ValueError("an ensemble is made in Python; a recipe names one judge of harm and one of refusals")
        _has_its_model(self)
        if "unsafe" not in registry.judge[self.name].facts.answers:
            raise ValueError(f"judge {self.name!r} does not tell harm; name it as `refusal`")
        return self

    def inputs(self) -> Iterator[str]:
        """Yield the model that the judge asks."""
        if self.backend is not None:
            yield from self.backend.inputs()


def _has_its_model(section: JudgeSection) -> None:
    entry = registry.judge[section.name]
    if section.calibrate and entry.facts.learns:
        raise ValueError(f"judge {section.name!r} measures itself while it learns; leave out calibrate")
    if section.calibrate and not entry.facts.asks_model:
        raise ValueError(f"calibrate measures judges that ask a model, and {section.name!r} asks none; leave it out")
    if section.calibrate == 1:
        raise ValueError("calibrate is 1, expected 2 labelled answers or more, some of both kinds")
    if entry.facts.asks_model and section.backend is None:
        raise ValueError(f"judge {section.name!r} asks a model: name it as `backend`")
    if not entry.facts.asks_model and section.backend is not None:
        raise ValueError(f"judge {section.name!r} asks no model: leave out its `backend`")
    if entry.facts.learns and section.backend is not None:
        if section.backend.model is None:
            raise ValueError(f"judge {section.name!r} reads hidden states, which no endpoint shows; give a `model`")
        if section.backend.thinking != "own":
            raise ValueError(f"judge {section.name!r} has its model write nothing: leave out `thinking`")
    alone = getattr(entry.function, "endpoint_alone", False)
    if alone and section.backend is not None and section.backend.endpoint is None:
        raise ValueError(f"judge {section.name!r} asks what endpoints alone answer: give its `backend` an `endpoint`")


class AnyJudgeSection(JudgeSection):
    """A judge of harm, or one of refusals alone."""

    @model_validator(mode="after")
    def _fits(self) -> AnyJudgeSection:
        if self.name == "ensemble":
            raise ValueError("an ensemble is made in Python; a recipe names one judge")
        _has_its_model(self)
        return self


def any_judge(value: Any) -> AnyJudgeSection:
    """Return a judge's section, whatever it tells.

    Args:
        value: Its name, or a mapping with ``name``, ``backend`` and ``knobs``.

    Raises:
        RecipeError: There is no such judge, or it lacks a model.
    """
    try:
        return AnyJudgeSection.model_validate(value)
    except ValidationError as error:
        raise RecipeError(explain(error, "judge", AnyJudgeSection)) from None


class Both:
    """A judge of harm beside one of refusals, which is asked where the first does not tell."""

    def __init__(self, harm: Judge, refusal: Judge) -> None:
        self.harm, self.refusal = harm, refusal
        self.name = harm.name if harm is refusal else f"{harm.name}+{refusal.name}"
        self.needs = harm.needs | refusal.needs

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        """Return one verdict for each item, in order."""
        found = self.harm.judge(items)
        rest = [i for i, said in enumerate(found) if said.refusal is None and not unjudged(items[i])]
        for i, said in zip(rest, self.refusal.judge([items[i] for i in rest]), strict=True):
            categories = (*found[i].categories, *said.categories)
            found[i] = replace(found[i], refusal=said.refusal, categories=categories)
        return found


def open_judge(section: JudgeSection) -> tuple[Judge, dict[str, Any]]:
    """Return the judge that a recipe names, and what is known of its errors.

    Raises:
        ModicumError: It cannot be made.
    """
    from modicum.evaluate.judges.declines import Declines
    from modicum.evaluate.judges.prefix import PrefixRefusal
    from modicum.jobs.attack_data import labelled

    entry = registry.judge[section.name]
    known: dict[str, Any] = {"judge": section.name, "approximate": entry.facts.approximate, "labelled": []}
    knobs = entry.knobs(section.knobs)
    backend = None if section.backend is None else open_target(section.backend, sampled=False)
    harm: Any = entry.function(backend, **knobs) if backend is not None else entry.function(**knobs)
    if entry.facts.learns:
        harm.fit(*labelled("harm"))
        known |= {"auroc": harm.area, "labelled": ["harm"]} | _errors(harm.calibration)
    tells_itself = "refusal" in entry.facts.answers and not entry.facts.learns
    if tells_itself and section.name != "prefix":
        return harm, known
    told_by = "prefix" if tells_itself else section.refusal
    teller: Judge = PrefixRefusal() if told_by == "prefix" else Declines(off_topic=told_by == "evasion")
    teller = harm if tells_itself else teller
    known["refusal"] = {"judge": told_by, "approximate": True}
    try:
        items, labels = labelled("refusal")
    except CheckpointError:  # without the package of labelled answers its errors stay unknown, which the report says
        return Both(harm, teller), known
    known["labelled"] = [*known["labelled"], "refusal"]
    known["refusal"] |= _errors(calibrate([verdict.refusal for verdict in teller.judge(items)], labels))
    return Both(harm, teller), known


def calibrated(section: JudgeSection, judge: Judge) -> dict[str, Any]:
    """Return a judge's errors on answers that people have labelled, harmful and harmless ones in equal parts.

    Raises:
        ModicumError: There are no labelled answers, or the judge reads none of one kind.
    """
    import torch

    from modicum.jobs.attack_data import labelled
    from modicum.random import generator

    items, labels = labelled("harm")
    order = torch.randperm(len(items), generator=generator(0, "calibrate")).tolist()
    half = [[i for i in order if labels[i] is kind][: section.calibrate // 2] for kind in (True, False)]
    chosen = [i for part in half for i in part]
    said = judge.judge([items[i] for i in chosen])
    found = calibrate([verdict.unsafe for verdict in said], [labels[i] for i in chosen])
    return {"labelled": ["harm"], "unparsed": found.unparsed, **_errors(found)}


def _errors(found: Calibration | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {
        "agreement": found.agreement._asdict(),
        "fpr": found.fpr._asdict(),
        "fnr": found.fnr._asdict(),
        "positives": found.positives,
        "negatives": found.negatives,
    }


def require_sampling(model: ChatModel, instead: str = "samples: 1 and temperature: 0") -> None:
    """Refuse several answers of a model that does not sample: they would all be one.

    Args:
        model: The model.
        instead: What to set where it cannot be helped.

    Raises:
        RecipeError: It does not.
    """
    if "sampling" not in model.caps:
        raise RecipeError(
            f"{model.name} gives the same answer at temperature 1 again and again, so best-of-N would be flat. Let the "
            f"server sample (transformers serve: without --continuous-batching), or set {instead}."
        )
