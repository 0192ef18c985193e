"""The router of a routed model: set, saved and loaded, what it looks at, and centred mixtures."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from models.routed.support_routed import experts_of, host, prompts, routed
from modicum.errors import RecipeError
from modicum.models import RoutedConfig, RoutedForCausalLM
from modicum.weights.mediator import build_experts

ONE_HOT = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]


def plain(model, weights):
    """A host of its own that holds the mixture."""
    other = host()
    other.load_state_dict(model.experts.state_dict(weights), strict=False)
    return other


@pytest.mark.parametrize("loaded", [False, True])
def test_the_router_that_was_set_last_is_used_and_saved(tmp_path, loaded):
    model, ids = routed(), prompts(4)
    if loaded:
        model.save_pretrained(tmp_path / "first")
        model = RoutedForCausalLM.from_pretrained(tmp_path / "first")
    fitted, sharp = routed().router, model.route(ids).uncertainty
    # The same logits, the first two experts exchanged, less sure, and with a gate.
    turned = {name: fitted.tensors[name][[1, 0, 2]] for name in ("weight", "bias", "centers")}
    model.router = replace(model.router, tensors={**fitted.tensors, **turned}, temperature=4.0, threshold=1e6)
    routes = model.route(ids)
    assert (routes.uncertainty > sharp + 0.01).all() and routes.distance is not None
    assert routes.weights[0].argmax() == 1 and routes.weights[1].argmax() == 0
    model.save_pretrained(tmp_path / "second")
    found = RoutedForCausalLM.from_pretrained(tmp_path / "second")
    assert found.router.temperature == 4.0 and found.router.threshold == 1e6
    for one, other in zip(found.route(ids), routes):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    found.router = None
    found.save_pretrained(tmp_path / "third")
    assert not (tmp_path / "third" / "router.safetensors").exists()
    assert RoutedForCausalLM.from_pretrained(tmp_path / "third").router is None
    assert (tmp_path / "second" / "router.safetensors").exists()


def test_what_distances_need_is_stored_with_a_gate_alone(tmp_path):
    model, ids = routed(), prompts(4)
    sizes = {}
    for threshold in (None, 2.0):
        model.router = replace(model.router, threshold=threshold)
        model.save_pretrained(tmp_path / str(threshold))
        parts = load_file(tmp_path / str(threshold) / "router.safetensors")
        sizes[threshold] = sum(part.nbytes for part in parts.values())
        assert ("precision" in parts) == (threshold is not None)
        found = RoutedForCausalLM.from_pretrained(tmp_path / str(threshold))
        assert torch.equal(found.route(ids).weights, model.route(ids).weights)
    found = RoutedForCausalLM.from_pretrained(tmp_path / "None")
    found.config.routing = {**found.config.routing, "threshold": 2.0}
    with pytest.raises(RecipeError, match="threshold needs the tasks' centers"):
        found.route(ids)  # no gate that lets everything pass
    width = 16
    assert sizes[2.0] - sizes[None] == 4 * (3 * width + width * (width + 1) // 2)


def test_a_centred_mixture_adds_weights_less_their_mean():
    base, experts = experts_of()
    built = build_experts(base, experts, ["model.layers.0", "model.layers.1"], density=0.5)
    config = RoutedConfig(host=host().config, routing={"centred": True})
    model = RoutedForCausalLM(config, host=host(), experts=built)
    for weights in ([1.0, 0, 0], [1 / 3] * 3):
        model.materialise(weights)
        want = built.state_dict(weights, centred=True)
        for name, target in model.working.targets.items():
            assert torch.equal(target, want[name])
    assert not torch.equal(built.state_dict([1.0, 0, 0])[name], built.state_dict([1.0, 0, 0], centred=True)[name])


@pytest.mark.parametrize("knobs", [{"sparsifier": "sign"}, {"dense": "base"}])
def test_a_model_whose_experts_cannot_be_centred_is_refused(knobs):
    base, experts = experts_of()
    built = build_experts(base, experts, ["model.layers.0"], **knobs)
    config = RoutedConfig(host=host().config, routing={"centred": True})
    with pytest.raises(RecipeError, match="centred needs"):
        RoutedForCausalLM(config, host=host(), experts=built)


def test_a_tap_that_is_no_block_is_refused():
    base, experts = experts_of()
    built = build_experts(base, experts, ["model.layers.2"], sparsifier="sign")
    config = RoutedConfig(host=host().config, routing={"tap": 3, "second_prefill": True})
    with pytest.raises(RecipeError, match="tap is block 3, and the model has 3"):
        RoutedForCausalLM(config, host=host(), experts=built)


def test_a_tap_behind_a_routed_block_needs_a_second_prefill():
    base, experts = experts_of()
    built = build_experts(base, experts, ["model.layers.1"], sparsifier="sign")
    for tap, fits in ((0, True), (1, True), (2, False)):
        config = RoutedConfig(host=host().config, routing={"tap": tap})
        if fits:
            RoutedForCausalLM(config, host=host(), experts=built)
            continue
        with pytest.raises(RecipeError, match="tap is block 2, behind the first routed block 1"):
            RoutedForCausalLM(config, host=host(), experts=built)
    config = RoutedConfig(host=host().config, routing={"tap": 2, "second_prefill": True})
    model = RoutedForCausalLM(config, host=host(), experts=built)
    ids = prompts()
    before = model.features(ids)
    model.materialise([1.0, 0, 0])
    assert torch.equal(model.features(ids), before)


def test_a_router_of_entropies_asks_every_expert():
    model, ids = routed(), prompts(2)
    model.config.routing = {**model.config.routing, "kind": "entropy", "selection": "soft"}
    model.router = type(model.router)("entropy", 3)
    found = model.features(ids)
    for t in range(3):
        logs = plain(model, ONE_HOT[t])(ids).logits[:, -1].double().log_softmax(-1)
        torch.testing.assert_close(found[:, t], -(logs.exp() * logs).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.route(ids).weights, (-found).softmax(1))
