import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.zero_token.support_zero import HOSTS, base_model, decode, looped, tokens
from modicum.errors import ModicumError, RecipeError, UnsupportedError
from modicum.models import calibrate_threshold, choose_cycle_range, convert_to_zero_token, fit_exit_gate, resize_pool
from modicum.models.zero_token.calibrate import cheapest, exit_curve
from modicum.models.zero_token.conversion import ends, keep_layers, low_rank
from modicum.models.zero_token.export import unroll
from modicum.registry import model as model_registry

ALL = ["llama", "llama-tied-bias", "qwen2", "qwen3", "mistral", "gpt2"]


def logits(model, **knobs):
    with torch.no_grad():
        return model(tokens(), use_cache=False, **knobs).logits


@pytest.mark.parametrize("host", ALL)
def test_one_cycle_without_zero_token_is_the_base_bit_for_bit(host):
    base = base_model(host)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    model = convert_to_zero_token(base, n_cycles=1, zero_token=False)
    assert torch.equal(logits(model), logits(base))
    assert model.generation_config.eos_token_id == base.generation_config.eos_token_id
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


@pytest.mark.parametrize("host", ["llama", "helium"])
def test_a_base_of_eager_attention_stays_so_bit_for_bit(host):
    config = AutoConfig.for_model(**HOSTS["llama"] | {"model_type": host, "head_dim": 4})
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model = convert_to_zero_token(base, n_cycles=1, zero_token=False)
    assert torch.equal(logits(model), logits(base))
    assert resize_pool(model, 2).config._attn_implementation == "eager"


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_rezero_starts_as_the_base_whatever_the_cycles(host):
    base = base_model(host)
    model = convert_to_zero_token(base, n_cycles=4, zero_token=False, cycle_gate="rezero")
    torch.testing.assert_close(logits(model), logits(base), atol=1e-6, rtol=0)
    assert torch.equal(model.zero_token.cycle_gate, torch.zeros(3))


def test_more_cycles_change_the_base():
    base = base_model()
    assert not torch.allclose(logits(convert_to_zero_token(base)), logits(base), atol=1e-2)


@pytest.mark.parametrize("tie_init", ["stepwise", "average", "lower", "upper", "random"])
@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_tying_equal_layers_gives_those_layers(tie_init, host):
    base = base_model(host, **({"n_layer": 6} if host == "gpt2" else {"num_hidden_layers": 6}))
    layers = base.transformer.h if host == "gpt2" else base.model.layers
    for layer in layers[2:5]:
        layer.load_state_dict(layers[1].state_dict())
    model = convert_to_zero_token(base, n_cycles=2, mode="tie", tie_init=tie_init, zero_token=False)
    assert model.config.host.num_hidden_layers == 4
    torch.testing.assert_close(logits(model), logits(base), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("tie_init", "expected"), [("stepwise", [1, 6]), ("lower", [1, 2]), ("upper", [5, 6]), ("average", None)]
)
def test_tying_takes_the_named_layers(tie_init, expected):
    base = base_model(num_hidden_layers=8)
    model = convert_to_zero_token(base, n_cycles=3, mode="tie", tie_init=tie_init, zero_token=False)
    assert len(model.layers) == 4
    for k in range(2):
        weight = model.layers[1 + k].mlp.up_proj.weight
        if expected is None:
            tied = torch.stack([base.model.layers[1 + k + 2 * c].mlp.up_proj.weight.double() for c in range(3)])
            torch.testing.assert_close(weight, tied.mean(0).float())
        else:
            assert torch.equal(weight, base.model.layers[expected[k]].mlp.up_proj.weight)
    assert torch.equal(model.layers[3].mlp.up_proj.weight, base.model.layers[7].mlp.up_proj.weight)


@pytest.mark.parametrize("host", ["smollm3", "gemma3_text"])
@pytest.mark.parametrize("tie_init", ["stepwise", "average", "lower", "upper", "random"])
def test_tied_layers_keep_the_kind_of_attention_that_their_weights_had(host, tie_init):
    name = "no_rope_layers" if host == "smollm3" else "layer_types"
    kinds = [1, 1, 0, 1, 0, 0]
    if host != "smollm3":
        kinds = [f"{('full', 'sliding')[kind]}_attention" for kind in kinds]
    base = base_model(host, num_hidden_layers=6, **{name: kinds})
    model = convert_to_zero_token(base, n_cycles=2, mode="tie", tie_init=tie_init, zero_token=False)
    found = getattr(model.config.host, name)
    assert (found[0], found[-1]) == (kinds[0], kinds[-1])
    if tie_init != "average":
        for layer, kind in zip(model.layers, found):
            weights = layer.self_attn.q_proj.weight
            (source,) = [
                i for i, old in enumerate(base.model.layers) if torch.equal(old.self_attn.q_proj.weight, weights)
            ]
            assert kind == kinds[source]


@pytest.mark.parametrize("dense", [[0, 2], [1, 5], [4]])
def test_layers_that_are_named_by_number_keep_their_kind(dense):
    base = base_model("qwen3_moe", num_hidden_layers=6, mlp_only_layers=dense)
    model = convert_to_zero_token(base, zero_token=False)
    torch.testing.assert_close(logits(unroll(model)), logits(model), atol=1e-5, rtol=0)
    tied = convert_to_zero_token(base, n_cycles=2, mode="tie", tie_init="upper", zero_token=False)
    kept = [0, 3, 4, 5]
    assert tied.config.host.mlp_only_layers == [new for new, old in enumerate(kept) if old in dense]
    assert [type(layer.mlp) for layer in tied.layers] == [type(base.model.layers[old].mlp) for old in kept]


@pytest.mark.parametrize("knobs", [{"tie_init": "average"}, {"lora_rank": 2}])
def test_layers_of_several_kinds_have_no_average_and_no_difference(knobs):
    base = base_model("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[1])
    with pytest.raises(UnsupportedError, match="several kinds"):
        convert_to_zero_token(base, n_cycles=2, mode="tie", zero_token=False, **knobs)


def test_first_layers_of_another_kind_stay_the_first():
    host = AutoConfig.for_model("glm4_moe", num_hidden_layers=6, first_k_dense_replace=2)
    keep_layers(host, [0, 1, 2, 3, 2, 3, 4])
    assert (host.first_k_dense_replace, host.num_hidden_layers) == (2, 7)
    with pytest.raises(UnsupportedError, match="n_head"):
        keep_layers(host, [0, 1, 2, 1, 2, 3])


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_low_rank_terms_of_full_rank_undo_the_tying(host):
    base = base_model(host, **({"n_layer": 6} if host == "gpt2" else {"num_hidden_layers": 6}))
    layers = base.transformer.h if host == "gpt2" else base.model.layers
    # Norms and biases are shared by the cycles: only the matrices can be given back.
    for layer in layers[2:5]:
        for name, parameter in layer.named_parameters():
            if parameter.dim() < 2:
                parameter.data.copy_(layers[1].get_parameter(name).data)
    tied = convert_to_zero_token(base, n_cycles=2, mode="tie", tie_init="average", zero_token=False)
    relaxed = convert_to_zero_token(base, n_cycles=2, mode="tie", tie_init="average", zero_token=False, lora_rank=48)
    assert not torch.allclose(logits(tied), logits(base), atol=1e-2)
    torch.testing.assert_close(logits(relaxed), logits(base), atol=1e-3, rtol=0)


def test_low_rank_is_the_best_approximation():
    residual = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    a, b = low_rank(residual, rank=2)
    singular = torch.linalg.svdvals(residual.double())
    torch.testing.assert_close((residual - b @ a).norm(), singular[2:].norm())


@pytest.mark.parametrize(
    "knobs", [{}, {"pool": "cycle"}, {"pool": "layer"}, {"cycle_gate": "rezero"}, {"lora_rank": 2}]
)
def test_resizing_keeps_old_cycles_and_copies_the_last(knobs):
    model = looped(n_cycles=2, cycle_embedding="add", zero_bias=True, cycle_loss_weights=[0.5, 0.5], **knobs)
    more = resize_pool(model, 4)
    for cycles in (1, 2):
        torch.testing.assert_close(logits(more, n_cycles=cycles), logits(model, n_cycles=cycles))
    torch.testing.assert_close(logits(resize_pool(more, 2)), logits(model))
    assert more.config.depth == 4 and model.config.depth == 2
    assert torch.equal(more.zero_token.cycle_embedding[3], model.zero_token.cycle_embedding[1])


def test_auto_ends_are_a_third_each():
    assert [ends(n, "auto") for n in (2, 4, 12, 30)] == [1, 1, 4, 10]
    model = convert_to_zero_token(base_model(num_hidden_layers=6), n_head="auto", n_tail="auto")
    assert model.config.middle == [2, 3]


def test_the_layers_whose_output_looks_like_their_input_are_chosen():
    base = base_model(num_hidden_layers=7)
    for layer in base.model.layers[3:5]:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    chosen = choose_cycle_range(base, [tokens(4, 12)], width=2)
    assert (chosen.n_head, chosen.n_tail) == (3, 2)
    assert chosen.distances[3] < 1e-6 < min(d for i, d in enumerate(chosen.distances) if i != 3)
    convert_to_zero_token(base, n_head=chosen.n_head, n_tail=chosen.n_tail)
    with pytest.raises(RecipeError, match="batches"):
        choose_cycle_range(base, [])
    with pytest.raises(RecipeError, match="width"):
        choose_cycle_range(base, [tokens()], width=7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype):
    model = convert_to_zero_token(base_model().to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model).isfinite().all()


def test_new_parameters_depend_on_the_seed_alone():
    a, b, c = (convert_to_zero_token(base_model(), seed=s).zero_token.zero_key for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert 0.01 < a.std() < 0.03


def test_the_registry_checks_the_knobs():
    entry = model_registry["zero_token"]
    assert entry.function is convert_to_zero_token
    assert entry.knobs({"n_cycles": 3, "n_head": "auto"})["n_tail"] == 1
    for wrong in ({"n_cycles": 0}, {"cycles": 2}, {"order": "back"}, {"n_head": -1}, {"zero_key_init_std": -0.1}):
        with pytest.raises(RecipeError):
            entry.knobs(wrong)


@pytest.mark.parametrize(
    "knobs",
    [
        {"n_head": 3, "n_tail": 3},
        {"mode": "fold"},
        {"mode": "tie", "n_cycles": 5},
        {"mode": "tie", "order": "sequence"},
        {"mode": "tie", "tie_init": "first"},
        {"tie_init": "first"},
        {"n_head": "automatic"},
    ],
)
def test_conversions_that_make_no_sense_are_refused(knobs):
    with pytest.raises(ModicumError):
        convert_to_zero_token(base_model(), **knobs)


def test_other_models_and_looped_ones_are_refused():
    for knobs in ({}, {"n_cycles": 2}, {"n_head": 2, "train_cycles": "random"}, {"mode": "tie"}):
        with pytest.raises(UnsupportedError, match="resize_pool"):
            convert_to_zero_token(looped(), **knobs)


def test_a_looped_model_takes_knobs_of_running_and_training():
    model = looped()
    again = convert_to_zero_token(model, train_cycles="random", exit_threshold=-1.0)
    assert again(tokens()).layer_calls == 4 and model(tokens()).layer_calls == 8
    assert "draws" in again.zero_token._buffers and "draws" not in model.zero_token._buffers


def test_hosts_that_cannot_be_looped_are_refused_by_name():
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    for kind, knobs in {
        "bloom": {"n_head": 2, "n_layer": 3},
        "xglm": {"d_model": 8, "ffn_dim": 8},
        "deepseek_v3": {},
        "stablelm": {"intermediate_size": 8, "num_key_value_heads": 2},
        "falcon": {},
        "opt": {"layerdrop": 0.1, "ffn_dim": 8, "word_embed_proj_dim": 8},
        "mamba": {},
        "bert": {"is_decoder": True, "intermediate_size": 8},
        "rwkv": {},
        "gemma4_text": {"head_dim": 8, "vocab_size_per_layer_input": 16, "intermediate_size": 8},
    }.items():
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | knobs))
        with pytest.raises(UnsupportedError, match="cannot be looped"):
            convert_to_zero_token(base)


def test_fields_with_an_entry_for_each_layer_go_by_visit():
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    thetas = [10.0, 100.0, 1000.0, 10000.0]
    config = AutoConfig.for_model(
        "granite_swa", **sizes, initializer_range=0.3, sliding_window=4, layer_rope_theta=thetas
    )
    model = convert_to_zero_token(AutoModelForCausalLM.from_config(config), n_cycles=2, zero_token=False)
    assert model.config.layer_rope_theta == [10.0, 100.0, 1000.0, 100.0, 1000.0, 10000.0]
    with torch.no_grad():
        want = model(tokens(), use_cache=False).logits
        torch.testing.assert_close(decode(model, tokens(), prefill=3)[0], want, atol=2e-4, rtol=0)
    sizes |= {"moe_topk": [1, 2, 1, 2], "num_experts": 4, "head_dim": 8}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("hunyuan_v1_moe", **sizes))
    tied = convert_to_zero_token(base, n_cycles=2, mode="tie", tie_init="upper")
    assert tied.config.host.moe_topk == [1, 1, 2] and tied.config.host.num_experts == 4


@pytest.mark.parametrize("criterion", ["zero_attention", "latent", "random"])
def test_the_calibrated_threshold_keeps_its_promise(criterion):
    model = looped(exit_scope="token", exit_criterion=criterion).train()
    batches = [tokens(3, 12), tokens(2, 9, seed=1)]
    curve = exit_curve(model, batches, candidates=5)
    found = {increase: cheapest(curve, max_loss_increase=increase) for increase in (0.0, 0.2, 100.0)}
    assert calibrate_threshold(model, batches, max_loss_increase=0.2, candidates=5) == found[0.2]
    assert model.training
    assert [point.mean_cycles for point in curve] == sorted((p.mean_cycles for p in curve), reverse=True)
    model.eval()
    for increase, point in found.items():
        assert point.loss <= point.full_loss + increase
        with torch.no_grad():
            outs = [model(x, labels=x, exit_threshold=point.threshold) for x in batches]
        counts = torch.tensor([x[:, 1:].numel() for x in batches])
        loss = (torch.stack([o.loss for o in outs]) * counts).sum() / counts.sum()
        assert loss.item() == pytest.approx(point.loss, abs=1e-4)
    assert found[100.0].mean_cycles == 1.0
    assert found[0.0].mean_cycles >= found[0.2].mean_cycles >= found[100.0].mean_cycles
    with pytest.raises(RecipeError):
        calibrate_threshold(model, [])


def test_a_fitted_exit_gate_is_resized_with_the_cycles():
    model = looped(n_cycles=3)
    fit_exit_gate(model, [tokens(4, 12)])
    gate = model.zero_token.exit_gate
    for n_cycles in (1, 2, 5):
        resized = resize_pool(model, n_cycles).zero_token.exit_gate
        assert torch.equal(resized, gate[[0, 1, 1, 1][: n_cycles - 1]])
