"""Which tensors vary, with every kind of LoRA layer there is to measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flatness_cases import (
    LoRALinear,
    TinyTransformer,
    all_products,
    dense_hessian,
    import_file,
    import_folder,
    rows,
    token_batches,
    token_loss,
)
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.flatness import SCOPES, HessianOperator, Problem, find_scope, supervised_loss

CROSS_ENTROPY = supervised_loss(F.cross_entropy)


def randomised(model: nn.Module) -> nn.Module:
    """B starts at zero, where half of the adapter's Hessian is zero: measure somewhere else."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(LoRALinear(4, 3), nn.Tanh(), LoRALinear(3, 3, bias=False)).double()
    return model


def test_adapter_holds_the_factors_alone() -> None:
    model = TinyTransformer(lora=True)
    scope = find_scope(model, "adapter")
    assert len(scope.names) == 4
    assert all("lora_A" in name or "lora_B" in name for name in scope.names)
    assert scope.size == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_adapter_leaves_out_frozen_factors_and_trainable_heads() -> None:
    model = two_layers()
    model[0].lora_A["default"].weight.requires_grad_(False)
    model[2].weight.requires_grad_(True)
    names = find_scope(model, "adapter").names
    assert names == ("0.lora_B.default.weight", "2.lora_A.default.weight", "2.lora_B.default.weight")
    assert "2.weight" in find_scope(model, "trainable").names


def test_frozen_base_stays_out_of_adapter_and_trainable_and_needs_no_gradient() -> None:
    model = TinyTransformer(lora=True)
    for name in ("adapter", "trainable"):
        scope = find_scope(model, name)
        with scope.installed():
            required = {name for name, p in model.named_parameters() if p.requires_grad}
        assert required == set(scope.names)
        assert "embedding.weight" not in required


def test_model_holds_everything_once_frozen_or_not() -> None:
    model = TinyTransformer(lora=True)
    scope = find_scope(model, "model")
    assert scope.size == sum(p.numel() for p in model.parameters())
    assert sum(name in ("embedding.weight", "head.weight") for name in scope.names) == 1
    with scope.installed():
        assert all(p.requires_grad for p in model.parameters())
    assert not model.embedding.weight.requires_grad


@pytest.mark.parametrize("scope", SCOPES)
def test_hessian_of_each_lora_scope_matches_the_dense_one(scope: str) -> None:
    model = randomised(TinyTransformer(lora=True))
    problem = Problem(model, token_batches(2, 1), token_loss, scope=scope)
    if scope == "merged":
        # The reference has ordinary linear layers in the place of the LoRA layers.
        other = randomised(TinyTransformer(lora=False))
        other.load_state_dict(model.state_dict(), strict=False)
        other.q, other.v = model.q.merged(), model.v.merged()
        dense = dense_hessian(problem, other, ["q.weight", "v.weight"])
    else:
        dense = dense_hessian(problem)
    torch.testing.assert_close(all_products(HessianOperator(problem)), dense, rtol=1e-9, atol=1e-11)


def test_merged_leaves_the_loss_as_it_is_and_takes_its_place_only_while_measuring() -> None:
    model = randomised(two_layers())
    batches = rows(5)
    adapter = Problem(model, batches, CROSS_ENTROPY, scope="adapter")
    merged = Problem(model, batches, CROSS_ENTROPY, scope="merged")
    assert merged.loss() == pytest.approx(adapter.loss(), rel=1e-13)
    assert merged.scope.names == ("0.merged", "2.merged")
    expected = model[0].weight + 1.5 * model[0].lora_B["default"].weight @ model[0].lora_A["default"].weight
    torch.testing.assert_close(merged.variables[0], expected, rtol=1e-13, atol=1e-14)
    before = model(batches[0][0])
    with torch.no_grad():
        merged.variables[0].mul_(2)
    assert merged.loss() != pytest.approx(adapter.loss(), rel=1e-3)
    assert torch.equal(model(batches[0][0]), before)
    assert "forward" not in model[0].__dict__


def test_merged_keeps_a_forward_that_somebody_else_has_put_in_place() -> None:
    model = randomised(two_layers())
    original = model[0].forward
    model[0].forward = lambda x: original(x)
    replaced = model[0].forward
    Problem(model, rows(5), CROSS_ENTROPY, scope="merged").loss_and_gradient()
    assert model[0].forward is replaced


@pytest.mark.parametrize("c", [0.1, 30.0])
def test_merged_curvature_does_not_depend_on_how_the_product_is_split(c: float) -> None:
    """A -> c A, B -> B / c is the same function; the factors' own Hessian does change."""
    operators = {}
    for factor in (1.0, c):
        model = randomised(two_layers())
        for layer in (model[0], model[2]):
            layer.lora_A["default"].weight.data *= factor
            layer.lora_B["default"].weight.data /= factor
        for scope in ("merged", "adapter"):
            problem = Problem(model, rows(5), CROSS_ENTROPY, scope=scope)
            operators[scope, factor] = all_products(HessianOperator(problem))
    torch.testing.assert_close(operators["merged", c], operators["merged", 1.0], rtol=1e-9, atol=1e-10)
    assert not torch.allclose(operators["adapter", c], operators["adapter", 1.0], rtol=0.1)


def test_merged_refuses_a_layer_that_one_matrix_does_not_describe() -> None:
    model = two_layers()
    original = model[0].forward
    model[0].forward = lambda x: original(x) ** 2
    with pytest.raises(UserError, match="0 is not linear in its input"):
        find_scope(model, "merged")


def test_a_scope_that_the_model_lacks_is_an_error_that_says_what_there_is() -> None:
    plain = nn.Linear(2, 2)
    with pytest.raises(UserError, match="scope=merged needs LoRA layers"):
        find_scope(plain, "merged")
    with pytest.raises(UserError, match="2 tensors 2 are trainable and 0 are LoRA factors"):
        find_scope(plain, "adapter")
    with pytest.raises(UserError, match="chooses no weight"):
        find_scope(plain.requires_grad_(False), "trainable")
    with pytest.raises(UserError, match="Did you mean 'merged'"):
        find_scope(plain, "merge")


def test_two_parameters_over_one_memory_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(UserError, match="two parameters over one memory"):
        find_scope(model, "model")


class Encoder(nn.Module):
    """What peft wants of a model: a config, and layers found by name."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(torch.tanh(self.q(x)))


def check_peft(model: nn.Module, update: Callable[[nn.Module], Tensor]) -> None:
    randomised(model).double().train()  # with LoRA's dropout on, as in training
    batches = rows(4, 3)
    adapter = Problem(model, batches, CROSS_ENTROPY, scope="adapter")
    dense = dense_hessian(adapter)
    torch.testing.assert_close(all_products(HessianOperator(adapter)), dense, rtol=1e-9, atol=1e-11)
    merged = Problem(model, batches, CROSS_ENTROPY, scope="merged")
    assert merged.loss() == pytest.approx(adapter.loss(), rel=1e-13)
    plain = Encoder().double()
    for name in ("q", "v"):
        layer = getattr(model.base_model.model, name)
        getattr(plain, name).weight.data.copy_(layer.weight + update(layer))
        getattr(plain, name).bias.data.copy_(layer.bias)
    dense = dense_hessian(merged, plain, ["q.weight", "v.weight"])
    torch.testing.assert_close(all_products(HessianOperator(merged)), dense, rtol=1e-9, atol=1e-11)
    assert model.training


def test_peft_is_measured_in_both_spaces() -> None:
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=6, lora_dropout=0.1, target_modules=["q", "v"])
    model = peft.get_peft_model(Encoder(), config)
    check_peft(model, lambda layer: 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 12, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def t5_batches() -> list[dict[str, Tensor]]:
    labels = torch.randint(1, 12, (5, 3))
    labels[3:, 1:] = -100
    tokens = torch.randint(1, 12, (5, 4))
    return [{"input_ids": tokens[i], "labels": labels[i]} for i in (slice(0, 2), slice(2, 5))]


@pytest.mark.parametrize("scope", SCOPES)
def test_t5_with_peft_agrees_with_differences_in_every_scope(scope: str) -> None:
    import peft

    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q", "v"], inference_mode=False
    )
    model = randomised(peft.get_peft_model(tiny_t5(), config)).double().train()
    operator = HessianOperator(Problem(model, t5_batches(), scope=scope))
    # T5 computes softmax and norms in float32 even with float64 weights: differences divide its rounding by a step of
    # 1e-5, while the products themselves stay symmetric to float32's precision.
    assert operator.disagreement_with_differences() < 3e-2
    U, V = torch.randn(2, operator.size, 2, dtype=torch.float64)
    left, right = U * operator.matmat(V), V * operator.matmat(U)
    assert (left.sum(dim=0) - right.sum(dim=0)).abs().max() < 1e-5 * left.norm(dim=0).max() * operator.size**0.5


def test_timm_vit_agrees_with_differences() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3).double()
    batches = [(torch.randn(n, 3, 8, 8, dtype=torch.float64), torch.randint(3, (n,))) for n in (3, 2)]
    assert HessianOperator(Problem(model, batches, CROSS_ENTROPY)).disagreement_with_differences() < 1e-5


def test_clip_agrees_with_differences() -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=12, max_position_embeddings=4, **sizes)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    model = CLIPModel(CLIPConfig.from_text_vision_configs(text, vision, projection_dim=4)).double()
    batches = [
        {
            "input_ids": torch.randint(1, 12, (n, 4)),
            "pixel_values": torch.randn(n, 3, 8, 8, dtype=torch.float64),
            "return_loss": True,
        }
        for n in (3, 2)
    ]
    problem = Problem(model, batches, terms=lambda batch: len(batch["input_ids"]))
    assert HessianOperator(problem).disagreement_with_differences() < 1e-5


@pytest.mark.third_party
def test_nlora_is_measured_in_both_spaces_with_its_old_and_new_factors(upstream: Callable[[str], Path]) -> None:
    vendored = import_folder(upstream("N-LoRA") / "src" / "peft", "nlora_peft")
    config = vendored.LoraConfig(r=2, lora_alpha=6, lora_dropout=0.1, target_modules=["q", "v"], r_sum=3)
    model = vendored.get_peft_model(Encoder(), config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("loranew_" in name)  # as its run script does

    def update(layer: nn.Module) -> Tensor:
        old = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        return 3 * (old + layer.loranew_B["default"].weight @ layer.loranew_A["default"].weight)

    check_peft(model, update)
    assert all("loranew_" in name for name in find_scope(model, "adapter").names)


@pytest.mark.third_party
def test_inflora_attention_is_measured_by_its_trainable_factors(upstream: Callable[[str], Path]) -> None:
    module = import_file(upstream("InfLoRA") / "models" / "vit_inflora.py", "inflora_vit")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module.Attention_LoRA(4, num_heads=2, r=2, n_tasks=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x.reshape(-1, 1, 4).repeat(1, 2, 1) * torch.tensor([[1.0], [-2.0]]), 1).mean(1)

    model = randomised(Classifier()).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B_k.1" in name or "lora_B_v.1" in name)  # A is fixed in InfLoRA
    problem = Problem(model, rows(4, 3), CROSS_ENTROPY, scope="adapter")
    assert problem.scope.names == ("attention.lora_B_k.1.weight", "attention.lora_B_v.1.weight")
    dense = dense_hessian(problem)
    torch.testing.assert_close(all_products(HessianOperator(problem)), dense, rtol=1e-9, atol=1e-11)
    with pytest.raises(UserError, match="scope=merged needs LoRA layers"):
        find_scope(model, "merged")


@pytest.mark.third_party
def test_cllora_attention_is_measured_by_its_adapters(upstream: Callable[[str], Path]) -> None:
    module = import_file(upstream("CL-LoRA") / "backbone" / "vit_cllora.py", "cllora_vit")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module.Attention_lora(4, num_heads=2, msa=[1, 0, 1])
            adapters = [module.Adapter_lora(None, d_model=4, bottleneck=2, init_option="lora") for _ in range(3)]
            self.cur_adapter = nn.ModuleList(adapters)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.reshape(-1, 1, 4).repeat(1, 2, 1) * torch.tensor([[1.0], [-2.0]])
            return self.attention(tokens, self.cur_adapter, block_weight=torch.ones(3)).mean(1)

    model = randomised(Classifier()).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("cur_adapter" in name and "adapter.1" not in name)
    problem = Problem(model, rows(4, 3), CROSS_ENTROPY, scope="adapter")
    assert len(problem.scope.names) == 4
    dense = dense_hessian(problem)
    torch.testing.assert_close(all_products(HessianOperator(problem)), dense, rtol=1e-9, atol=1e-11)
