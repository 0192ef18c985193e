"""A checkpoint is a lazy mapping from tensor names to tensors; opening one reads headers only.

Single and sharded safetensors, a local folder or a Hub id, and a PEFT LoRA adapter, which reads as its base with the
adapter folded in. Nothing is pickled unless the caller asks for it, and an index may not point outside its folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.architectures import is_tied_unsaid
from modicum.borders import border, check_once, check_plain, check_plain_folder, read_index
from modicum.content import Stamp, check_in_place, hash_files, unchanged
from modicum.errors import CheckpointError, UnsupportedError
from modicum.layout import (
    ADAPTER_CONFIG,
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    copies,
    role,
    token_axis,
    with_tokens,
)
from modicum.references import beside, find_model, on_itself
from modicum.weights.adapter import Adapter, fold_delta, load_pickle, read_json
from modicum.weights.configs import rewritten
from modicum.weights.files import MappedFile, Slot, Spec, read_header
from modicum.weights.whole import check_layers, check_parts, inside

PICKLES = "pytorch_model*.bin"
PICKLED = (".bin", ".pt", ".pth")
CARRIED = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
NOT_CARRIED = re.compile(
    r"\.index\.json$|^adapter_config\.json$|^trainer_state\.json$|^manifest\.json$|^all_results\.json$|^record\.json$"
)
PACKED = re.compile(
    r"\.(qweight|qzeros|scales|absmax|quant_map|quant_state\..*|SCB|weight_packed|weight_scale(_inv)?)$"
)

Resolver = Callable[[str], Path]


class Checkpoint(Mapping[str, Tensor]):
    """A model on disk as a lazy mapping of tensors; treat the tensors as read-only.

    Args:
        source: A folder, a ``.safetensors`` file, a Hub id or ``builtin:NAME``; a folder with ``adapter_config.json``
            is folded into its base.
        resolve: Turns a reference into a local path, that of an adapter's base too; the resolver of recipes,
            :func:`modicum.references.find_model`, when not given.
        base: The adapter's base, when it is not where the adapter says.
        allow_pickle: Allow ``pytorch_model.bin``, loaded with ``weights_only=True``.
        pickled: The same, by its name in version 0.1.
        remote_code: Also fetch the code that comes with the model, and carry it to what is made from it.

    Example:
        >>> import tempfile, pathlib
        >>> from safetensors.torch import save_file
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> save_file({"w": torch.ones(2)}, folder / "model.safetensors")
        >>> Checkpoint(folder)["w"]
        tensor([1., 1.])
    """

    def __init__(
        self,
        source: str | Path,
        *,
        resolve: Resolver | None = None,
        base: str | Path | None = None,
        allow_pickle: bool = False,
        pickled: bool = False,
        remote_code: bool = False,
    ) -> None:
        allow_pickle = allow_pickle or pickled
        self.name, self.remote_code = str(source), remote_code
        resolve = resolve or partial(find_model, allow_pickle=allow_pickle, remote_code=remote_code)
        path = resolve(str(source))
        self.folder = path if path.is_dir() else path.parent
        self.adapter: Adapter | None = None
        self._beneath: Checkpoint | None = None
        self.buffers: frozenset[str] = frozenset()  # tensors known to be no weights
        self.rows: int | None = None  # of the vocabulary, where an adapter brings another one along
        self._slots: dict[str, Slot] = {}
        self._loaded: dict[str, Tensor] = {}
        self._stamps: dict[Path, Stamp] = {}
        check_plain_folder(path) if path.is_dir() else check_plain(path)
        with border(self.name):
            if path.is_dir() and (path / ADAPTER_CONFIG).exists():
                self._open_adapter(path, resolve, base, allow_pickle)
            else:
                self._open_weights(path, allow_pickle)
                check_layers(self, self.config, self.name)
                self._refuse_packed()
                self._drop_copies()
                self._drop_tied()

    def _open_weights(self, path: Path, allow_pickle: bool) -> None:
        if path.is_file():
            check_parts([path], self.name)
            if path.suffix in PICKLED:
                return self._load_pickled([path], allow_pickle)
            if path.suffix != ".safetensors":
                raise CheckpointError(f"{self.name} is a {path.suffix or 'file'}, expected .safetensors or a folder.")
            self._slots = self._header(path)
        elif (path / INDEX).exists():
            self._slots = self._read_index(path)
            check_once(path, [file.name for file in self._stamps], self.name)
        else:
            check_parts(files := sorted(path.glob("*.safetensors")), self.name)
            single = path / SINGLE
            if single in files or len(files) == 1:
                self._slots = self._header(single if single in files else files[0])
            elif files and not (path / "config.json").exists():
                self._slots = self._read_all(files)
            elif files:
                raise CheckpointError(
                    f"{self.name} has {len(files)} safetensors files but no {INDEX}. Download it again."
                )
            else:
                self._open_pickled(path, allow_pickle)

    def _read_all(self, files: Sequence[Path]) -> dict[str, Slot]:
        """Return the tensors of a folder that is no model of transformers', and so has no index."""
        slots: dict[str, Slot] = {}
        for file in files:
            found = self._header(file)
            if twice := sorted(slots.keys() & found.keys()):
                raise CheckpointError(f"{self.name}: {file.name} and another file both have {twice[0]!r}. Remove one.")
            slots |= found
        return slots

    def _read_index(self, folder: Path) -> dict[str, Slot]:
        listed = read_index(folder, self.name)
        slots: dict[str, Slot] = {}
        for file in sorted(set(listed.values())):
            found = self._header(folder / file)
            wanted = {name for name, where in listed.items() if where == file}
            for name in sorted(wanted ^ set(found)):
                problem = "has no tensor" if name in wanted else "has, but the index does not list, the tensor"
                raise CheckpointError(f"{self.name}: {file} {problem} {name!r}. Download it again.")
            slots.update(found)
        return slots

    def _header(self, path: Path) -> dict[str, Slot]:
        slots = read_header(path, owner=self.name)
        self._stamps[path] = Stamp.of(path)
        return slots

    def _open_pickled(self, folder: Path, allow_pickle: bool) -> None:
        files = sorted(folder.glob(PICKLES))
        if not files:
            raise CheckpointError(f"{self.name} holds no weights: expected model.safetensors or {INDEX} in {folder}.")
        check_parts(files, self.name)
        self._load_pickled(files, allow_pickle)

    def _load_pickled(self, files: Sequence[Path], allow_pickle: bool) -> None:
        if not allow_pickle:
            raise CheckpointError(
                f"{self.name} has pickled weights only ({files[0].name}), which can run code when they are read. "
                "Convert them to safetensors, or set allow_pickle: true if you trust their source."
            )
        for file in files:
            self._stamps[file] = Stamp.of(file)
            found = load_pickle(file, self.name)
            if twice := sorted(self._loaded.keys() & found.keys()):
                raise CheckpointError(f"{self.name}: {file.name} and another file both have {twice[0]!r}. Remove one.")
            self._loaded.update(found)

    def _open_adapter(self, folder: Path, resolve: Resolver, base: str | Path | None, allow_pickle: bool) -> None:
        self.adapter = adapter = Adapter(folder, owner=self.name, allow_pickle=allow_pickle)
        self._stamps = {path: Stamp.of(path) for path in (folder / ADAPTER_CONFIG, adapter.file)}
        reference = str(base or beside(folder, adapter.base))
        if not reference:
            raise CheckpointError(f"{self.name}: {ADAPTER_CONFIG} names no base model. Give the base.")

        def another(name: str) -> Path:
            path = resolve(name)
            if path.resolve() == folder.resolve():
                raise on_itself(folder)
            return path

        self._beneath = beneath = Checkpoint(
            reference, resolve=another, allow_pickle=allow_pickle, remote_code=self.remote_code
        )
        adapter.fit(beneath)
        if beneath.tied and beneath.tied not in beneath:
            adapter.tie(beneath.tied)
        self.rows = self._resized(beneath, adapter)
        for name, change in adapter.factors.items():
            self._check_change(beneath, name, change.shape)
        for name, tensor in adapter.replaced.items():
            self._check_change(beneath, name, tuple(tensor.shape))

    def _resized(self, beneath: Checkpoint, adapter: Adapter) -> int | None:
        """Return how many rows the vocabulary has that the adapter brings along; ``None`` where it brings none."""
        stored = {name: tensor.shape for name, tensor in adapter.replaced.items() if token_axis(name) is not None}
        other = {
            name: shape[0] for name, shape in stored.items() if name in beneath and shape != beneath.spec(name).shape
        }
        if not other:
            return None
        rows = next(iter(other.values()))
        tables = {name: stored.get(name, beneath.spec(name).shape) for name in beneath if token_axis(name) is not None}
        sizes = {name: shape[token_axis(name) or 0] for name, shape in tables.items()}
        if left := next((name for name, size in sizes.items() if size != rows), None):
            way = "Save it with all its embeddings: save_embedding_layers=True in PEFT."
            raise CheckpointError(  # PEFT saves no buffers, such as BART's biases
                f"{self.name}: the adapter stores {next(iter(other))!r} with {rows} rows, and {left!r} has "
                f"{sizes[left]}. " + ("Merge it into its resized base with PEFT first." if token_axis(left) else way)
            )
        return rows

    def _check_change(self, beneath: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
        if name not in beneath:
            tied = f"; {name!r} is tied to another tensor there" if name == beneath.tied else ""
            raise CheckpointError(
                f"{self.name}: the adapter changes {name!r}, which its base {beneath.name} does not have{tied}. "
                "Use the base that it was trained on; if its file calls the tensor otherwise, merge the adapter into "
                "it with PEFT first."
            )
        expected = beneath.spec(name).shape
        if self.rows is not None:
            expected = with_tokens(name, expected, self.rows)
        if shape != expected:
            raise CheckpointError(
                f"{self.name}: the adapter changes {name!r} of shape {list(shape)}, "
                f"its base {beneath.name} has {list(expected)}. Use the base that it was trained on."
            )

    def _refuse_packed(self) -> None:
        method = self.config.get("quantization_config")
        packed = next((name for name in self if PACKED.search(name) or _is_float8(self.spec(name).dtype)), None)
        if method or packed:
            what = f"tensor {packed!r}" if packed else f"quantization_config {str(method)[:60]}"
            raise UnsupportedError(
                f"{self.name} is quantised ({what}); its packed numbers cannot be averaged. "
                "Use the model that it was made from, or save one that transformers has dequantised."
            )

    def _drop_copies(self) -> None:
        """Leave out further copies of the embedding that encoders and decoders share, which some files hold."""
        for name in copies(self):
            if torch.equal(self[name[0]], self[name[1]]):
                self._slots.pop(name[0], None)
                self._loaded.pop(name[0], None)

    def _drop_tied(self) -> None:
        if not self.tied or self.tied not in self:
            return
        tables = [name for name in self if role(name) == "embedding"]
        if not tables:
            return
        if not any(torch.equal(self[name], self[self.tied]) for name in tables):
            raise CheckpointError(
                f"{self.name}: its config ties {self.tied!r} to {tables[0]!r}, but the two differ. "
                "Set tie_word_embeddings to false in its config.json, or remove one."
            )
        self._slots.pop(self.tied, None)
        self._loaded.pop(self.tied, None)

    @property
    def base(self) -> Checkpoint:
        """The model beneath an adapter; this one itself when there is none."""
        return self._beneath or self

    @property
    def notes(self) -> list[str]:
        """What a user should know of how it is read."""
        return self.adapter.notes if self.adapter else []

    @cached_property
    def config(self) -> dict[str, Any]:
        """Contents of ``config.json``; empty when there is none."""
        if self._beneath:
            config = self._beneath.config
            return config if self.rows is None else rewritten(config, vocab_size=self.rows)
        path = self.folder / "config.json"
        return read_json(path, self.name) if path.exists() else {}

    @cached_property
    def tied(self) -> str | None:
        """Name of the output layer when the config ties it to the embedding: one tensor, kept under the other name."""
        text = self.config.get("text_config", {})
        tied = self.config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
        if tied is None:
            tied = is_tied_unsaid(str(self.config.get("model_type")))
        if not tied:
            return None
        heads = (name for name in (*self._slots, *self._loaded) if role(name) == "head" and name.endswith(".weight"))
        return next(heads, "lm_head.weight")

    def spec(self, name: str) -> Spec:
        """Return shape and dtype of a tensor, without reading it."""
        if self._beneath:
            spec = self._beneath.spec(name)
            if self.rows is not None:
                spec = Spec(with_tokens(name, spec.shape, self.rows), spec.dtype)
            return Spec(spec.shape, torch.float32) if name in self._changed else spec
        if name in self._slots:
            return self._slots[name].spec
        tensor = self._loaded[name]
        return Spec(tuple(tensor.shape), tensor.dtype)

    @cached_property
    def _changed(self) -> frozenset[str]:
        return frozenset(self.adapter.factors) if self.adapter else frozenset()

    @cached_property
    def _files(self) -> dict[Path, MappedFile]:
        return {path: MappedFile(path, self._stamps[path]) for path in {slot.path for slot in self._slots.values()}}

    def __getitem__(self, name: str) -> Tensor:
        if self._beneath and self.adapter:
            weight = self.adapter.replaced[name] if name in self.adapter.replaced else self._beneath[name]
            change = self.adapter.factors.get(name)
            return fold_delta(weight, change, f"{self.name}: {name}") if change else weight
        if name in self._slots:
            slot = self._slots[name]
            return self._files[slot.path].tensor(slot)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._beneath if self._beneath else name in self._slots or name in self._loaded

    def __iter__(self) -> Iterator[str]:
        return iter(self._beneath) if self._beneath else iter(sorted({*self._slots, *self._loaded}))

    def __len__(self) -> int:
        return len(self._beneath) if self._beneath else len(self._slots) + len(self._loaded)

    @cached_property
    def identity(self) -> list[list[object]]:
        """What its tensors depend on: every file that they are read from, those of an adapter's base included."""
        own: list[list[object]] = [[path.name, found] for path, found in self._hashes.items()]
        return own + (self._beneath.identity if self._beneath else [])

    @cached_property
    def _hashes(self) -> dict[Path, str]:
        found = hash_files(sorted(self._stamps))
        unchanged(self._stamps.items())
        return found

    def check(self) -> None:
        """Raise unless its files, and those of an adapter's base, are what they were when they were opened.

        Raises:
            CheckpointError: One was written to since; see :func:`modicum.content.check_in_place`.
        """
        known: Mapping[Path, str] = self.__dict__.get("_hashes", {})  # none where nobody asked for the identity
        for path, before in self._stamps.items():
            check_in_place(path, before, known.get(path))
        if self._beneath:
            self._beneath.check()

    @property
    def nbytes(self) -> int:
        """Bytes to read for all tensors."""
        if self._beneath and self.adapter:
            factors = (t for f in self.adapter.factors.values() for t in (f.A, f.B))
            return self._beneath.nbytes + sum(t.nbytes for t in factors)
        return sum(self.spec(name).nbytes for name in self)

    def companions(self) -> list[Path]:
        """Files that belong to the model besides its weights: config, tokenizer, generation defaults, license."""
        if self._beneath:
            files = self._beneath.companions()
            own = {p.name: inside(p, self.name) for p in sorted(self.folder.iterdir()) if p.name in TOKENIZER_FILES}
            if self.rows is None or not own:
                return files
            # Other rows are other tokens, whose tokenizer lies beside the adapter.
            return sorted([*(path for path in files if path.name not in TOKENIZER_FILES), *own.values()])
        files = [path for path in sorted(self.folder.iterdir()) if path.is_file()]
        return [
            inside(path, self.name)
            for path in files
            if (path.suffix in CARRIED and not NOT_CARRIED.search(path.name))
            or (path.suffix == ".py" and self.remote_code)
            or (path.stem.upper() in ("LICENSE", "NOTICE") and path.suffix in ("", ".txt", ".md"))
        ]


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1
