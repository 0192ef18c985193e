"""Load models: a whole one, a PEFT adapter on its base, a fresh one of some shape, and their tokenizers.

Weights are read from ``safetensors`` only, and no code that comes with a model runs, unless the caller says otherwise.
Everything is checked before ``transformers`` sees it, so that a broken folder is one clear line and a missing tensor is
an error instead of random numbers.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum import borders, registry
from modicum.errors import CheckpointError, RecipeError, UnsupportedError, did_you_mean, first_line
from modicum.jobs.loading.folders import (
    beneath,
    check_sizes,
    check_weights,
    read_json,
    try_patterns,
)
from modicum.jobs.loading.references import no_progress_bars, resolve_model
from modicum.layout import ADAPTER_CONFIG, VOCABULARY_FILES
from modicum.shortage import pass_on

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MOST_LAYERS, MOST_ENTRIES = 10_000, 10**11  # of models that are made without weights
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    ref: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    remote_code: bool = False,
    trainable: bool = False,
    attention: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model, or a PEFT adapter on top of its base, in evaluation mode.

    Args:
        ref: See :func:`resolve_model`; an adapter folder names its base itself.
        dtype: Dtype of the weights; ``"auto"`` takes the checkpoint's own.
        device: Where the model goes.
        allow_pickle: Accept pickled weights (loaded with ``weights_only=True``).
        remote_code: Run the code that comes with the model.
        trainable: Leave an adapter's weights trainable.
        attention: Attention implementation, such as ``"sdpa"`` or ``"eager"``; the library's choice when not given.

    Raises:
        CheckpointError: The folder is incomplete or corrupt, or tensors are missing, extra, mis-shaped or not finite.
    """
    options: dict[str, Any] = {"allow_pickle": allow_pickle, "remote_code": remote_code}
    model = _load(ref, dtype=dtype, attention=attention, trainable=trainable, **options)
    _check_finite(model, ref)
    return model.to(device)


def rehearse_model(
    ref: str | Path, *, allow_pickle: bool = False, remote_code: bool = False, attention: str | None = None
) -> PreTrainedModel:
    """Return what :func:`load_model` would, without its numbers, in no memory: what that would refuse is refused.

    Args:
        ref: See :func:`resolve_model`.
        allow_pickle: Accept pickled weights.
        remote_code: Run the code that comes with the model.
        attention: Attention implementation.

    Raises:
        CheckpointError: The folder is incomplete, or tensors are missing, extra or mis-shaped.
    """
    options: dict[str, Any] = {"allow_pickle": allow_pickle, "remote_code": remote_code}
    return _load(ref, dtype="auto", attention=attention, trainable=False, device_map="meta", **options)


def rehearse_loading(ref: str | Path, *, remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """Do :func:`rehearse_model`, and look at the tokenizer too; for what will load both.

    Raises:
        CheckpointError: Either cannot be loaded.
    """
    model = rehearse_model(ref, remote_code=remote_code, **options)
    load_tokenizer(ref, remote_code=remote_code)
    return model


def _load(
    ref: str | Path, *, trainable: bool, allow_pickle: bool, remote_code: bool, **options: Any
) -> PreTrainedModel:
    shared: dict[str, Any] = {"allow_pickle": allow_pickle, "remote_code": remote_code}
    *adapters, whole = beneath(resolve_model(ref, **shared), **shared)
    for folder in adapters:
        check_weights(folder, allow_pickle=allow_pickle)
    model = _load_whole(whole, **shared, **options)
    for folder in reversed(adapters):
        # PEFT would mix up two adapters of one name.
        model = _with_adapter(in_one_piece(model), folder, trainable=trainable)
    return model


def in_one_piece(model: Any) -> Any:
    """Return a model with its adapter merged into it; one without an adapter as it is."""
    return getattr(model, "merge_and_unload", lambda: model)()


def looped_model(model: Any, ref: str) -> Any:
    """Return a looped model with its adapter merged into it.

    Args:
        model: Of :func:`load_model` or :func:`rehearse_model`.
        ref: What was loaded.

    Raises:
        UnsupportedError: It is another kind of model.
    """
    from modicum.models.zero_token.model import ZeroTokenForCausalLM

    whole = in_one_piece(model)
    if not isinstance(whole, ZeroTokenForCausalLM):
        raise UnsupportedError(f"{ref} is no looped model. Convert one first: model.convert of a train job.")
    return whole


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Return the layers of a model that LoRA can change: PEFT is asked, which refuses some of Mamba's and its kin's."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import pytorch_utils

    kinds = (torch.nn.Linear, pytorch_utils.Conv1D)
    found = [name for name, module in model.named_modules() if isinstance(module, kinds)]

    def taken(names: Sequence[str]) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                inject_adapter_in_model(LoraConfig(r=1, target_modules=list(names)), copy.deepcopy(model))
            except ValueError:
                return False
        return True

    if not found or taken(found):
        return found
    by_end: dict[str, list[str]] = {}
    for name in found:
        by_end.setdefault(name.rpartition(".")[2], []).append(name)
    refused = {end for end, names in by_end.items() if not taken(names[:1])}
    return [name for name in found if name.rpartition(".")[2] not in refused]


def skeleton(folder: Path) -> PreTrainedModel | None:
    """Return transformers' own class for a model, without weights or memory for them; ``None`` where it has none."""
    import torch
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not (folder / "config.json").is_file():
        return None
    written = read_json(folder / "config.json")
    if written.get("model_type") not in CONFIG_MAPPING or "auto_map" in written:
        return None
    classes = [getattr(transformers, name, None) for name in written.get("architectures") or []]
    if len(classes) != 1 or classes[0] is None:
        return None
    check_sizes(written, str(folder), MOST_LAYERS, MOST_ENTRIES)
    with borders.border(f"{folder}/config.json"), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: PreTrainedModel = classes[0]._from_config(AutoConfig.from_pretrained(folder))
    return made


def model_shape(ref: str | Path, fields: Mapping[str, Any], *, remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of a model with some fields changed; its weights are not read, if it has any.

    Args:
        ref: See :func:`resolve_model`.
        fields: Fields of its ``config.json`` that are to differ.
        remote_code: Run the code that comes with the model.

    Raises:
        RecipeError: A field is unknown, or the values contradict each other.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder = resolve_model(ref, remote_code=remote_code)
    _know_architecture(folder, remote_code=remote_code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:  # whatever transformers stumbles over in a configuration that is not one
        pass_on(error)
        raise CheckpointError(f"{folder}: cannot read its config.json: {first_line(error)}") from None
    known = config.to_dict()
    check_sizes(known | dict(fields), "scratch", MOST_LAYERS, MOST_ENTRIES)
    for key in fields:
        if key not in known or key == "model_type":
            raise RecipeError(f"scratch: {ref} has no field {key!r} to set. {did_you_mean(key, known)}")
    # What follows from other fields is worked out again, unless it is given.
    derived = {"layer_types"}
    if known.get("head_dim") and known["head_dim"] * config.num_attention_heads == config.hidden_size:
        derived.add("head_dim")
    kept = {key: value for key, value in known.items() if key not in derived}
    try:
        return type(config).from_dict({**kept, **fields})
    except (TypeError, ValueError, StrictDataclassError) as error:
        # The strict configurations say what is wrong in the last line.
        raise RecipeError(f"scratch: {str(error).strip().splitlines()[-1].strip()}") from None


def fresh_model(
    config: PreTrainedConfig,
    *,
    seed: int,
    dtype: str = "float32",
    attention: str | None = None,
    remote_code: bool = False,
) -> PreTrainedModel:
    """Return an untrained causal language model, its weights drawn by ``seed`` alone.

    Raises:
        RecipeError: The configuration is none that a model can be made of.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from modicum.random import derive_seed

    try:
        # transformers draws from the global generator; the fork keeps that to these lines.
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, "scratch"))
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=remote_code
            )
    except (*borders.MALFORMED, RuntimeError) as error:  # no room for it, too
        raise RecipeError(f"scratch: {first_line(error)}") from None


def native_bfloat16(device: str | torch.device) -> bool:
    """Whether matrix products in bfloat16 run on the device's own instructions.

    Where they do not, they are emulated, ten to forty times slower than float32 on a processor with AVX2 only.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def usable(dtype: str, device: str) -> None:
    """Refuse a dtype or a device that a model cannot have here.

    Raises:
        RecipeError: There is no such dtype, or no such device on this machine.
    """
    import torch

    found = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise RecipeError(f"dtype is {dtype!r}, expected auto, float32, bfloat16 or float16.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        pass_on(error)
        told = first_line(error).rstrip(".")
        raise RecipeError(f"device is {device!r}, which cannot be used here: {told}.") from None


def load_tokenizer(ref: str | Path, *, remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; an adapter folder without one takes that of its base.

    Raises:
        CheckpointError: There is no tokenizer, or it cannot be read.
    """
    for folder in beneath(resolve_model(ref, remote_code=remote_code), remote_code=remote_code):
        if any((folder / name).is_file() for name in VOCABULARY_FILES):
            break
    else:
        raise CheckpointError(f"{ref} holds no tokenizer (looked for {', '.join(VOCABULARY_FILES)}). Copy one there.")
    from transformers import AutoTokenizer

    from modicum.jobs.loading.tokenizers import check_tokens

    check_tokens(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:  # the tokenizers library raises plain Exception on a file it cannot parse
        pass_on(error)
        raise CheckpointError(f"{ref}: cannot read the tokenizer: {first_line(error)}") from None


def _load_whole(
    folder: Path, *, attention: str | None, allow_pickle: bool, remote_code: bool, **options: Any
) -> PreTrainedModel:
    _know_architecture(folder, remote_code=remote_code)
    check_weights(folder, allow_pickle=allow_pickle)
    from transformers import AutoModelForCausalLM

    try:
        with no_progress_bars(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # told below, as shapes
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                attn_implementation=attention,
                trust_remote_code=remote_code,
                use_safetensors=None if allow_pickle else True,
                ignore_mismatched_sizes=True,  # so that the report below names them
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # whatever transformers stumbles over in a configuration that is not one
        pass_on(error)
        raise CheckpointError(f"{folder}: cannot load the model: {first_line(error)}") from None
    if report["missing_keys"]:
        raise CheckpointError(f"{folder} lacks {_some(report['missing_keys'])}, which its config.json asks for.")
    if report["unexpected_keys"]:
        raise CheckpointError(f"{folder} has {_some(report['unexpected_keys'])}, which its config.json does not know.")
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise CheckpointError(f"{folder}: tensor {name!r} is {tuple(found)}, config.json asks for {tuple(expected)}.")
    return model.eval()


def _know_architecture(folder: Path, *, remote_code: bool) -> None:
    """Import modicum's own model where a checkpoint needs it: that registers it with the Auto classes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a model: it holds no config.json.")
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if not remote_code and "auto_map" in config and kind not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"{folder} comes with code of its own, which is not run. Set remote_code: true if you trust its source."
        )
    if isinstance(kind, str) and kind in registry.model:
        _ = registry.model[kind]


def _with_adapter(base: PreTrainedModel, folder: Path, *, trainable: bool) -> PreTrainedModel:
    from peft import PeftModel

    with borders.border(f"{folder}/{ADAPTER_CONFIG}"):
        try_patterns(read_json(folder / ADAPTER_CONFIG), base, str(folder))
    try:
        with warnings.catch_warnings():
            # PEFT only warns when an adapter lacks tensors, and leaves them at their random start.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            made = PeftModel.from_pretrained(
                base, str(folder), is_trainable=trainable, low_cpu_mem_usage=base.device.type == "meta"
            )
            return made.train(trainable)
    except Exception as error:  # whatever PEFT stumbles over
        pass_on(error)
        raise CheckpointError(f"{folder}: the adapter does not fit its base: {first_line(error)}") from None


def _check_finite(model: PreTrainedModel, ref: str | Path) -> None:
    import torch

    for name, tensor in model.named_parameters():
        # The sum is NaN or infinite whenever an entry is; the full check runs only then.
        if not torch.isfinite(tensor.detach().sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{ref}: tensor {name!r} holds NaN or infinite values. The model is not usable.")


def _some(names: Any) -> str:
    first, *rest = sorted(names)
    return f"tensor {first!r}" + (f" and {len(rest)} more" if rest else "")
