r"""What a model holds in mind while it reads: the states that enter a block, and their mean over an answer's tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modicum.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def answer_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor, *, layer: int
) -> Tensor:
    r"""Return the mean hidden state of each row over its answer, after one block.

    .. math:: h_i = \frac{1}{|A_i|} \sum_{t \in A_i} h^{(\ell)}_{i,t}

    Args:
        model: A causal language model; its head is not run.
        input_ids: Conversations with their answers, (n, length), padded on the right.
        attention_mask: 1 at tokens, 0 at padding, (n, length).
        answer_mask: 1 at the tokens :math:`A_i` of the answer, (n, length).
        layer: :math:`\ell`, from 0 (embeddings) to the number of blocks.

    Returns:
        float32 of shape (n, width).

    Raises:
        RecipeError: The shapes differ, a row has no answer, or the layer does not exist.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
        >>> ids, ones, answer = torch.tensor([[1, 2, 3]]), torch.ones(1, 3), torch.tensor([[0, 1, 1]])
        >>> found = answer_states(model, ids, ones, answer, layer=0)
        >>> bool(torch.allclose(found, model.model.embed_tokens.weight[[2, 3]].mean(0)))
        True

    Cost:
        One forward pass up to the block, where the model keeps its blocks in one list; else through all of them.
    """
    if not input_ids.shape == attention_mask.shape == answer_mask.shape or input_ids.ndim != 2:
        raise RecipeError(
            f"Ids, mask and answers have the shapes {tuple(input_ids.shape)}, {tuple(attention_mask.shape)} and "
            f"{tuple(answer_mask.shape)}, expected the same rows of tokens."
        )
    answer = (answer_mask * attention_mask).to(torch.float32)
    counts = answer.sum(-1, keepdim=True)
    if not bool((counts > 0).all()):
        raise RecipeError(f"Row {int((counts[:, 0] == 0).nonzero()[0])} has no token of an answer.")
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask.to(torch.int64), "use_cache": False}
    states = _states(getattr(model, "base_model", model), layer, inputs)
    return torch.einsum("nt,ntd->nd", answer, states.float()) / counts


class _ReachedError(Exception):
    """The states that were wanted are there: no further block need run."""


def states_entering(block: nn.Module, run: Callable[[], object]) -> Tensor:
    """Return the hidden states that enter a block; neither it nor what lies behind it computes.

    Args:
        block: One of a model's blocks, given its states first or by the name ``hidden_states``.
        run: Does a forward pass of the model.

    Raises:
        UnsupportedError: The pass ends without the block.
    """
    seen: list[Tensor] = []

    def stop(_: object, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(given[0] if given else named["hidden_states"])
        raise _ReachedError

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _ReachedError:
        return seen[0]
    finally:
        hook.remove()
    raise UnsupportedError(f"the model's pass never comes to the {type(block).__name__} whose input is asked for")


def _states(body: PreTrainedModel, layer: int, inputs: dict[str, Any]) -> Tensor:
    """Return the hidden states after some blocks, (n, length, width)."""
    count = body.config.num_hidden_layers
    if not 0 <= layer <= count:
        raise RecipeError(f"There is no layer {layer}, expected 0 to {count}.")
    stacks = [part for part in body.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if len(stacks) != 1 or layer == count:
        found: Tensor = body(**inputs, output_hidden_states=True).hidden_states[layer]
        return found
    return states_entering(stacks[0][layer], lambda: body(**inputs))
