"""Models by reference: a local folder, a Hub id, a PEFT adapter folder, or a ``builtin:`` one.

Weights are read from ``safetensors`` only, and no code that comes with a model runs, unless the caller says otherwise.
Everything is checked before ``transformers`` sees it, so that a broken folder is one clear line and a missing tensor is
an error instead of random numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from modicum.errors import CheckpointError, RecipeError, did_you_mean
from modicum.layout import VOCABULARY_FILES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
PICKLES = ("*.bin", "*.pt", "*.pth")
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


def cache_folder() -> Path:
    """Return where modicum keeps what it makes once: ``MODICUM_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("MODICUM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modicum"


def resolve_model(ref: str | Path, *, allow_pickle: bool = False, remote_code: bool = False) -> Path:
    """Return the local folder of a model, fetching or building it when needed.

    Args:
        ref: A folder, ``builtin:NAME``, or a Hub id (``org/name``, ``org/name@revision``).
        allow_pickle: Also download pickled weights from the Hub.
        remote_code: Also download the model's own code from the Hub.

    Raises:
        CheckpointError: There is no such folder, builtin or Hub repository.
        MissingExtraError: The builtin needs a package that is not installed.
    """
    text = str(ref)
    kind, colon, name = text.partition(":")
    if colon and kind == "builtin":
        if name not in BUILTINS:
            raise CheckpointError(f"There is no builtin model {name!r}. {did_you_mean(name, BUILTINS)}")
        return _built(name)
    if colon and kind == "stage":
        raise CheckpointError(f"{text} names a stage, which only a later stage of the same pipeline can read.")
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{text} is a file, expected the folder of a model.")
    # A Hub id is `name` or `org/name`; anything else is a path, and so is what lies in a folder that exists.
    inside = folder.parent != Path() and folder.parent.is_dir()
    if inside or folder.is_absolute() or text.startswith((".", "~")) or len(folder.parts) > 2:
        raise CheckpointError(f"There is no model folder {text}. Check the path.")
    return _download(text, allow_pickle=allow_pickle, remote_code=remote_code)


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
    folder = resolve_model(ref, allow_pickle=allow_pickle, remote_code=remote_code)
    options: dict[str, Any] = {"allow_pickle": allow_pickle, "remote_code": remote_code}
    if is_adapter(folder):
        check_weights(folder, allow_pickle=allow_pickle)
        base = load_model(adapter_base(folder), dtype=dtype, attention=attention, **options)
        model = _with_adapter(base, folder, trainable=trainable)
    else:
        model = _load_whole(folder, dtype=dtype, attention=attention, **options)
    _check_finite(model, ref)
    return model.to(device)


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
    config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    known = config.to_dict()
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
    except (TypeError, ValueError) as error:
        raise RecipeError(f"scratch: {_first_line(error)}") from None


def native_bfloat16(device: str | torch.device) -> bool:
    """Whether matrix products in bfloat16 run on the device's own instructions.

    Where they do not, they are emulated, ten to forty times slower than float32 on a processor with AVX2 only.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def load_tokenizer(ref: str | Path, *, remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; an adapter folder without one takes that of its base.

    Raises:
        CheckpointError: There is no tokenizer, or it cannot be read.
    """
    folder = resolve_model(ref, remote_code=remote_code)
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        if is_adapter(folder):
            return load_tokenizer(adapter_base(folder), remote_code=remote_code)
        raise CheckpointError(f"{ref} holds no tokenizer (looked for {', '.join(VOCABULARY_FILES)}). Copy one there.")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:  # the tokenizers library raises plain Exception on a file it cannot parse
        raise CheckpointError(f"{ref}: cannot read the tokenizer: {_first_line(error)}") from None


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` is a PEFT adapter rather than a whole model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def adapter_base(folder: Path) -> str:
    """Return the reference of the base model that the adapter in ``folder`` was trained on."""
    base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder}/adapter_config.json does not say base_model_name_or_path. Set it there.")
    beside = folder / base
    return str(beside if beside.is_dir() else base)


def check_weights(folder: Path, *, allow_pickle: bool = False) -> None:
    """Raise unless ``folder`` holds readable weights that all lie inside it.

    Raises:
        CheckpointError: Weights are missing, pickled, truncated or outside the folder.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{index} points outside its folder, to {outside[0]!r}. This is not a sound model.")
        shards = [folder / name for name in names]
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            raise CheckpointError(f"{folder} lacks {missing[0]}, which its index names. Copy or download it again.")
    else:
        shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles and not allow_pickle:
            raise CheckpointError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when read. "
                "Convert them to safetensors, or set allow_pickle: true if you trust their source."
            )
        if not pickles:
            raise CheckpointError(f"{folder} holds no weights, expected *.safetensors.")
    for shard in shards:
        try:
            with safe_open(shard, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is corrupt or cut short ({_first_line(error)}) Get it again.") from None


def _load_whole(
    folder: Path, *, dtype: str | torch.dtype, attention: str | None, allow_pickle: bool, remote_code: bool
) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a model: it holds no config.json.")
    _read_json(folder / "config.json")
    check_weights(folder, allow_pickle=allow_pickle)
    import torch
    from transformers import AutoModelForCausalLM

    import modicum.models  # noqa: F401 - makes modicum's own architectures known to AutoModel

    try:
        with _no_progress_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=remote_code,
                use_safetensors=None if allow_pickle else True,
                ignore_mismatched_sizes=True,  # so that the report below names them
                output_loading_info=True,
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder}: cannot load the model: {_first_line(error)}") from None
    if report["missing_keys"]:
        raise CheckpointError(f"{folder} lacks {_some(report['missing_keys'])}, which its config.json asks for.")
    if report["unexpected_keys"]:
        raise CheckpointError(f"{folder} has {_some(report['unexpected_keys'])}, which its config.json does not know.")
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise CheckpointError(f"{folder}: tensor {name!r} is {tuple(found)}, config.json asks for {tuple(expected)}.")
    return model.eval()


def _with_adapter(base: PreTrainedModel, folder: Path, *, trainable: bool) -> PreTrainedModel:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT only warns when an adapter lacks tensors, and leaves them at their random start.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            return PeftModel.from_pretrained(base, str(folder), is_trainable=trainable).train(trainable)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, UserWarning) as error:
        raise CheckpointError(f"{folder}: the adapter does not fit its base: {_first_line(error)}") from None


def _check_finite(model: PreTrainedModel, ref: str | Path) -> None:
    import torch

    for name, tensor in model.named_parameters():
        # The sum is NaN or infinite whenever an entry is; the full check runs only then.
        if not torch.isfinite(tensor.detach().sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{ref}: tensor {name!r} holds NaN or infinite values. The model is not usable.")


def _download(ref: str, *, allow_pickle: bool, remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = ref.partition("@")
    patterns = [*HUB_FILES, *(PICKLES if allow_pickle else ()), *(["*.py"] if remote_code else ())]
    try:
        with _no_progress_bars():
            return Path(
                snapshot_download(
                    name,
                    revision=revision or None,
                    allow_patterns=patterns,
                    ignore_patterns=["*/*", "consolidated*"],  # other formats of the same weights
                )
            )
    except HFValidationError:
        raise CheckpointError(f"There is no model folder {ref}, and it is not a Hub id (org/name).") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"There is no folder {ref}, and the Hub gave no model of that name: {_first_line(error)}"
        ) from None


def _built(name: str) -> Path:
    """Return the cached folder of a builtin model, building it beside and renaming it when it is whole."""
    revision, build = BUILTINS[name]
    folder = cache_folder() / "models" / f"{name}-{revision}"
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent, f".{name}-*")
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    except OSError as error:
        raise _cannot_cache(folder.parent, error) from None
    try:
        build(partial)
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            # Another process was faster; its folder is the same as ours.
            if not (folder / "config.json").is_file():
                raise
    except OSError as error:
        raise _cannot_cache(folder.parent, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove what a killed build left; one that is under way is younger than an hour."""
    for path in folder.glob(pattern):
        if time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)


def _cannot_cache(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"Cannot write the model cache {folder}: {error.strerror or error}. "
        "Set MODICUM_CACHE to a folder with about 300 MB of space."
    )


def _build_smollm2(folder: Path) -> None:
    from modicum.jobs.loading.builtins import smollm2

    with _no_progress_bars():
        smollm2.build(folder)


def _build_byte_llama(folder: Path) -> None:
    from modicum.jobs.loading.builtins import byte_llama

    byte_llama.build(folder)


# Raise the revision whenever the builder makes other bytes, so that an old cache is not taken for the new one.
BUILTINS: Mapping[str, tuple[str, Callable[[Path], None]]] = MappingProxyType(
    {"byte-llama": ("r1", _build_byte_llama), "smollm2-135m-instruct": ("r1", _build_smollm2)}
)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the libraries' own bars off the terminal: modicum draws one per job."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is {type(value).__name__}, expected a JSON object.")
    return value


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."


def _some(names: Any) -> str:
    first, *rest = sorted(names)
    return f"tensor {first!r}" + (f" and {len(rest)} more" if rest else "")
