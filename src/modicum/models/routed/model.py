"""Several fine-tunes of one base, served as one model that picks or blends them for each request."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.initialization import no_init_weights, no_tie_weights

from modicum.errors import RecipeError, UnsupportedError
from modicum.knobs import guarded
from modicum.layout import stacks
from modicum.models.routed import folder as files
from modicum.models.routed.beside import SidePath
from modicum.models.routed.config import RoutedConfig, Routing
from modicum.models.routed.mixed import Mixed
from modicum.models.routed.requests import FIXED, Groups, Requests, groups_of, rows_of
from modicum.models.routed.working import WorkingWeights, settled
from modicum.models.router import Router
from modicum.references import find_model, pinned
from modicum.types import NonNegativeInt
from modicum.weights.experts import ExpertSet

ASKED = ("output_hidden_states", "output_attentions")
CACHES = ("cache", "past_key_values")  # what transformers calls it: the second name is the older one


@guarded
class RoutedForCausalLM(Requests, PreTrainedModel, GenerationMixin):
    """A host model with several experts in little more memory than one.

    The host is any causal language model of transformers. A request's weights of the experts are chosen from its
    prompt, written into the host's own tensors, and kept until its answer is complete.

    Args:
        config: The host's architecture, the experts and the routing.
        host: The model to serve in; a fresh one when not given.
        experts: Dense weights and stored differences.
        router: What weighs the experts by a prompt; without one they weigh alike, unless weights are given.
        memory_bytes: How much copies of mixtures used before may take.

    Example:
        >>> from transformers import LlamaConfig
        >>> host = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=1)
        >>> RoutedForCausalLM(RoutedConfig(host=host))(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 16])
    """

    config_class = RoutedConfig
    base_model_prefix = "host"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(
        self,
        config: RoutedConfig,
        *,
        host: PreTrainedModel | None = None,
        experts: ExpertSet | None = None,
        router: Router | None = None,
        memory_bytes: NonNegativeInt = 0,
    ) -> None:
        super().__init__(config)
        self.host = AutoModelForCausalLM.from_config(config.host) if host is None else host
        self.config.host = self.host.config
        self.config._attn_implementation = self.host.config._attn_implementation
        self.host.config._name_or_path = ""  # a folder is the same wherever it was loaded from
        self.generation_config = self.host.generation_config
        self.experts = experts
        self._router: Router | None = None
        if router is not None:
            self.router = router
        self._folder: Path | None = None
        self._fixed: Tensor | None = None
        self.working: WorkingWeights | None = None
        self.side: SidePath | None = None
        self.mixed = Mixed()
        if experts is not None:
            self.requires_grad_(False)
            self.config.experts = asdict(experts.about)
            self.working = WorkingWeights(self.host, experts, memory_bytes=memory_bytes)
            if experts.routed and SidePath.fits(experts):
                self.side = SidePath(self.host, experts, dict(self.working.names))
            _check_tap(config, experts, next(iter(stacks(n for n, _ in self.host.named_parameters()).values()), 0))
            if config.route.centred:
                experts.about.coefficients(experts.about.even, centred=True)  # refuses what cannot be centred
        with no_init_weights(), no_tie_weights():  # the host's are what they are
            self.post_init()
        self.eval()

    @property
    def router(self) -> Router | None:
        """What weighs the experts by a prompt; its temperature and threshold are those of ``config.routing``."""
        route = self.config.route
        return self._router and replace(self._router, temperature=route.temperature, threshold=route.threshold)

    @router.setter
    def router(self, router: Router | None) -> None:
        self._router = router
        known = Routing() if router is None else router
        self.config.routing = {
            **self.config.routing,
            "kind": known.kind,
            "temperature": known.temperature,
            "threshold": known.threshold,
        }

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *_: Any,
        config: RoutedConfig | None = None,
        memory_bytes: int = 0,
        verify: bool = True,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """Load a routed model; the experts and the dense weights of routed layers stay mapped from disk.

        Args:
            pretrained_model_name_or_path: What :meth:`save_pretrained` or the job ``route`` wrote, or a reference.
            config: Its configuration; read when not given.
            memory_bytes: How much copies of mixtures used before may take.
            verify: Compare every file with its checksum, which reads all of it once.
            output_loading_info: Return transformers' report too.
            **options: For the host, such as ``dtype``, ``device_map`` and ``attn_implementation``.

        Raises:
            CheckpointError: A file is missing, damaged, or of another host or build.
            UnsupportedError: The weights are to be quantised.
        """
        if options.get("quantization_config") is not None:
            raise UnsupportedError("A routed model writes its weights anew, which packed numbers do not allow.")
        path = find_model(pinned(str(pretrained_model_name_or_path), options.pop("revision", None)))
        config = config or RoutedConfig.from_pretrained(path)
        if verify and config.checksums:
            files.check_files(path, config.checksums)
        for key in ("cache_dir", "token", "subfolder", "force_download", "local_files_only"):
            options.pop(key, None)  # the folder is here by now
        host, info = AutoModelForCausalLM.from_pretrained(path, config=config.host, output_loading_info=True, **options)
        experts, router = files.read_experts(path, config), files.read_router(path, config)
        model = cls(config, host=host, experts=experts, router=router, memory_bytes=memory_bytes)
        model._folder = path
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the model, with the router in use, and the dense weights whatever mixture is in use.

        The weights and experts of a loaded model are written byte for byte as they were.
        """
        out = Path(save_directory)
        out.mkdir(parents=True, exist_ok=True)
        if self._folder is not None and self._folder.resolve() != out.resolve():
            for path in [*files.weight_files(self._folder), *self._folder.glob("*.safetensors.index.json")]:
                shutil.copy2(path, out / path.name)
        elif self._folder is None:
            if self.working is not None:
                self.working.dense()
            self.host.save_pretrained(out)
            if self.experts is not None:
                self._write_experts(out)
        files.write_router(out, self.router)
        self.config.architectures = [type(self).__name__]
        self.config.checksums = files.checksums(out)
        self.config.save_pretrained(out)
        self.generation_config.save_pretrained(out)

    def _write_experts(self, out: Path) -> None:
        from safetensors.torch import save_file

        assert self.experts is not None  # noqa: S101
        parts = {name: part.contiguous() for name, part in self.experts.parts.items()}
        save_file(parts, out / f"{files.EXPERTS}.safetensors", metadata={"format": "pt"})

    # What transformers asks of any model is the host's to answer.

    def get_input_embeddings(self) -> Any:
        """Return the token embedding."""
        return self.host.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the language-model head."""
        return self.host.get_output_embeddings()

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        """Refuse: the folder's dense weights would no longer be those of the model.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("The vocabulary of a routed model is that of its experts. Resize them, and build again.")

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the host makes of a step's inputs."""
        return self.host.prepare_inputs_for_generation(*args, **kwargs)

    @property
    def layers(self) -> Any:
        """The blocks of the host."""
        stack = next(iter(stacks(name for name, _ in self.host.named_parameters())), None)
        if stack is None:
            raise UnsupportedError(f"A {self.config.host.model_type} model has no stack of blocks to tap.")
        return self.host.get_submodule(stack)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        weights: Sequence[float] | Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model. Each row is a request: its weights are the router's, unless they are given.

        Args:
            input_ids: Tokens.
            attention_mask: 1 for real tokens, cached ones included.
            weights: Of the experts, for all rows ``(T)`` or each ``(n, T)``.
            logits_to_keep: As the host's.
            labels: Targets, as the host's.
            **kwargs: The host's. A cache remembers the weights that filled it.

        Raises:
            RecipeError: Weights were given that are not those that filled the cache.
            UnsupportedError: Rows of several experts are to share a cache, which only LoRA experts can.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": logits_to_keep, **kwargs}
        given |= {} if labels is None else {"labels": labels}
        # What is asked of the configuration is asked of the outer one, and the host reads its own.
        given = {key: True for key in ASKED if getattr(self.config, key)} | given
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        embeds = {key: kwargs[key] for key in ("inputs_embeds",) if kwargs.get(key) is not None}
        rows = self._weights(input_ids, attention_mask, weights, cache, embeds)
        if rows is None:
            return self.host(**given)
        groups = groups_of(rows)
        if len(groups) == 1:
            self.materialise(rows[0])
            return _remembered(self.host(**given), rows)
        # What rows share, a cache or a loss, one expert after the other cannot give.
        shared = labels is not None or cache is not None or given.get("use_cache") is not False
        if self._beside(input_ids, rows, groups, shared=shared):
            with self._side(rows):
                return _remembered(self.host(**given), rows)
        return self._one_by_one(groups, given)

    def _beside(self, ids: Tensor | None, rows: Tensor, groups: Groups, *, shared: bool, **lengths: int) -> bool:
        """Return whether a batch of several experts is run beside the dense weights; see :class:`Mixed`."""
        if self.side is None:
            return False
        return shared or ids is None or self.mixed.beside(self, ids, rows, groups, **lengths)

    @contextmanager
    def _side(self, rows: Tensor) -> Iterator[None]:
        assert self.side is not None and self.working is not None  # noqa: S101
        self.working.dense()
        with self.side([settled(row) for row in rows.tolist()]):  # the mixtures that would be written
            yield

    def _one_by_one(self, groups: Groups, given: dict[str, Any]) -> Any:
        """Run the rows of one mixture after those of another; without a cache, which rows would share."""
        if given.get("labels") is not None or given.get("cache", given.get("past_key_values")) is not None:
            raise UnsupportedError("Rows of several experts share no cache and no loss. Give them batch by batch.")
        n, found = sum(map(len, groups.values())), []
        ways = {"use_cache": False, "return_dict": True}
        for weights, numbers in groups.items():
            self.materialise(weights)
            found.append(self.host(**{**rows_of(given, numbers, n), **ways}))
        numbers = [i for group in groups.values() for i in group]
        places = torch.tensor(numbers).argsort()
        whole = type(found[0])(**{key: _in_order([part[key] for part in found], places) for key in found[0]})
        return whole.to_tuple() if given.get("return_dict") is False else whole

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, weights: Any = None, **kwargs: Any) -> Any:
        """Answer prompts, each by its own weights of the experts, which stay the same until the answer ends.

        Args:
            inputs: Prompts; ``input_ids`` is the same.
            weights: Of the experts, for all prompts ``(T)`` or each ``(n, T)``; the router's when not given.
            **kwargs: As in transformers.

        Raises:
            UnsupportedError: An output object or a stream is asked for, and the prompts have several experts.
        """
        ids = kwargs.pop("input_ids", inputs)
        mask = kwargs.get("attention_mask")
        embeds = {key: kwargs[key] for key in ("inputs_embeds",) if kwargs.get(key) is not None}
        pad, ends = self._special(kwargs)
        if ids is not None and mask is None and pad is not None and pad not in ends and bool((ids == pad).any()):
            mask = (ids != pad).long()
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        rows = self._weights(ids, mask, weights, cache, embeds) if ids is not None or embeds else None
        if rows is None:
            return self.host.generate(ids, **kwargs)
        groups = groups_of(rows)
        if len(groups) == 1:
            self.materialise(rows[0])
            return _remembered(self.host.generate(ids, **kwargs), rows, cache)
        shared = bool(kwargs.get("return_dict_in_generate")) or kwargs.get("streamer") is not None or cache is not None
        if self._beside(ids, rows, groups, shared=shared, **self._lengths(kwargs, ids)):
            with self._side(rows):
                return _remembered(self.host.generate(ids, **kwargs), rows, cache)
        if shared:
            raise UnsupportedError("Prompts of several experts give no common output object. Ask one after the other.")
        return self._answered(groups, ids, kwargs, len(rows))

    def _answered(
        self, groups: Mapping[tuple[float, ...], list[int]], ids: Any, kwargs: dict[str, Any], n: int
    ) -> Tensor:
        found: dict[int, Tensor] = {}
        for weights, numbers in groups.items():
            self.materialise(weights)
            part = rows_of(kwargs, numbers, n)
            output = self.host.generate(None if ids is None else ids[numbers], **part)
            for number, answer in zip(numbers, output.split(len(output) // len(numbers))):
                found[number] = answer
        length = max(answer.shape[1] for answer in found.values())
        pad, ends = self._special(kwargs)
        fill = next(iter(ends), 0) if pad is None else pad  # as transformers fills up what ended early
        parts = [torch.nn.functional.pad(found[i], (0, length - found[i].shape[1]), value=fill) for i in range(n)]
        return torch.cat(parts)

    def _lengths(self, kwargs: Mapping[str, Any], ids: Tensor | None) -> dict[str, int]:
        """Return the most tokens of an answer, and how many rows each prompt has: beams or samples."""
        config = kwargs.get("generation_config") or self.generation_config
        names = ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")
        new, whole, beams, samples = (kwargs.get(name, getattr(config, name, None)) for name in names)
        left = (whole or 0) - (0 if ids is None else ids.shape[1])
        return {"tokens": new or max(0, left), "each": max(beams or 1, samples or 1)}

    def _special(self, kwargs: Mapping[str, Any]) -> tuple[int | None, list[int]]:
        """Return the padding token of a generation, if there is one, and the tokens that end an answer."""
        config = kwargs.get("generation_config") or self.generation_config
        pad, end = (kwargs.get(key, getattr(config, key)) for key in ("pad_token_id", "eos_token_id"))
        ends = [] if end is None else torch.as_tensor(end).reshape(-1).tolist()
        return None if pad is None else int(pad), ends


def _in_order(parts: Sequence[Any], places: Tensor) -> Any:
    """Return the rows of several outputs, or of each of their layers, in the order of the batch."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))[places.to(parts[0].device)]
    return tuple(_in_order(layer, places) for layer in zip(*parts))


def _remembered(output: Any, rows: Tensor, *caches: Any) -> Any:
    """Let every cache of a request remember the weights that filled it."""
    made = next((output[name] for name in CACHES if isinstance(output, Mapping) and name in output), None)
    for cache in (*caches, made):
        if cache is not None:
            setattr(cache, FIXED, rows)
    return output


def _check_tap(config: RoutedConfig, experts: ExpertSet, depth: int) -> None:
    """Refuse a tap that is no block of the host, or whose input depends on what it decides."""
    from modicum.layout import layer_of

    route = config.route
    if route.tap >= max(depth, 1):
        raise RecipeError(f"tap is block {route.tap}, and the model has {depth}. Tap one from 0 to {depth - 1}.")
    first = min((layer.number for name in experts.routed if (layer := layer_of(name))), default=None)
    outside = any(layer_of(name) is None for name in experts.routed)
    if route.kind == "entropy" or route.second_prefill or first is None:
        return
    if route.tap > first or outside:
        raise RecipeError(
            f"tap is block {route.tap}, behind the first routed block {first}: what it sees would depend on the "
            "experts. Tap that block or an earlier one, or set second_prefill: true."
        )


AutoModelForCausalLM.register(RoutedConfig, RoutedForCausalLM)
