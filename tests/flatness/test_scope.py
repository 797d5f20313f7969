"""Which tensors vary, with every kind of LoRA layer there is to measure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.flatness import (
    SCOPES,
    HessianOperator,
    Problem,
    checkpoint_point,
    find_scope,
    model_point,
    supervised_loss,
)
from flatpatch.flatness.directions import unit_axes
from flatpatch.flatness.scope import rank_axis
from tests.flatness_cases import (
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


@pytest.mark.parametrize("scope", [scope for scope in SCOPES if scope != "tangent"])  # test_tangent.py's
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


@pytest.mark.filterwarnings("ignore:the loss has kinks")
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


# --- attention with one pair of factors per task, like InfLoRA's


class TaskAttention(nn.Module):
    """Joint qkv, and factors of keys and values per task that the forward sums up; not a line of InfLoRA's."""

    def __init__(self, width: int = 4, r: int = 2, tasks: int = 3) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        for name in "kv":
            setattr(self, f"lora_A_{name}", nn.ModuleList(nn.Linear(width, r, bias=False) for _ in range(tasks)))
            setattr(self, f"lora_B_{name}", nn.ModuleList(nn.Linear(r, width, bias=False) for _ in range(tasks)))

    def forward(self, x: Tensor, task: int) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        for t in range(task + 1):
            k = k + self.lora_B_k[t](self.lora_A_k[t](x))
            v = v + self.lora_B_v[t](self.lora_A_v[t](x))
        return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v


class Classifier(nn.Module):
    """Attention over two tokens made of one example, with the adapters up to a task."""

    def __init__(self, attention: nn.Module, task: int) -> None:
        super().__init__()
        self.attention, self.task = attention, task

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 1, 4).repeat(1, 2, 1) * x.new_tensor([[1.0], [-2.0]])
        return self.attention(tokens, self.task).mean(1)


def after_two_tasks(attention: nn.Module) -> Classifier:
    """Random factors of tasks 0 and 1; those of task 2 still add nothing, as before its training."""
    model = randomised(Classifier(attention, 1)).double()
    for name in "kv":
        nn.init.zeros_(getattr(attention, f"lora_B_{name}")[2].weight)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B_k.1" in name or "lora_B_v.1" in name)  # A is fixed in InfLoRA
    return model


def check_task_attention(model: Classifier, batches: list[tuple[Tensor, Tensor]], width: int) -> None:
    """The Hessian over keys' and values' matrices is that of the same model without LoRA, over these rows of qkv."""
    attention: Any = model.attention
    factors_before = [name for name, _ in model.named_parameters()]
    merged = Problem(model, batches, CROSS_ENTROPY, scope="merged")
    assert merged.scope.names == ("attention.k.merged", "attention.v.merged")
    assert merged.loss() == pytest.approx(model_loss_of(model, batches), rel=1e-13)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        rows_of = plain.attention.qkv.weight.chunk(3)
        for name, W, variable in zip("kv", rows_of[1:], merged.variables, strict=True):
            A, B = (getattr(attention, f"lora_{factor}_{name}") for factor in "AB")
            W.add_(sum(B[t].weight @ A[t].weight for t in (0, 1)))
            torch.testing.assert_close(variable, W, rtol=1e-13, atol=1e-14)
            for t in range(3):
                getattr(plain.attention, f"lora_B_{name}")[t].weight.zero_()
    dense = dense_hessian(merged, plain, ["attention.qkv.weight"])[width * width :, width * width :]
    torch.testing.assert_close(all_products(HessianOperator(merged)), dense, rtol=1e-9, atol=1e-11)
    assert [name for name, _ in model.named_parameters()] == factors_before
    assert "forward" not in vars(attention) and "forward" not in vars(attention.qkv)


def model_loss_of(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """The mean loss, without the package."""
    with torch.no_grad():
        total = sum(F.cross_entropy(model(x), y, reduction="sum").item() for x, y in batches)
    return total / sum(len(y) for _, y in batches)


def test_task_attention_is_measured_in_both_spaces() -> None:
    model = after_two_tasks(TaskAttention())
    adapter = Problem(model, rows(4, 3), CROSS_ENTROPY, scope="adapter")
    assert adapter.scope.names == ("attention.lora_B_k.1.weight", "attention.lora_B_v.1.weight")
    torch.testing.assert_close(all_products(HessianOperator(adapter)), dense_hessian(adapter), rtol=1e-9, atol=1e-11)
    check_task_attention(model, rows(4, 3), 4)


def test_merged_task_attention_refuses_a_loss_that_leaves_out_learned_tasks() -> None:
    model = after_two_tasks(TaskAttention())
    model.task = 0
    with pytest.raises(UserError, match="adapters of tasks 0 to 0, but those of task 1 are not zero"):
        Problem(model, rows(4), CROSS_ENTROPY, scope="merged")


def test_merged_task_attention_refuses_factors_that_do_not_pair() -> None:
    attention = TaskAttention()
    del attention.lora_B_v[2]
    with pytest.raises(UserError, match="as many factors in lora_A_v as in lora_B_v"):
        find_scope(Classifier(attention, 1), "merged")
    attention = TaskAttention()
    attention.qkv = nn.Linear(4, 8)
    with pytest.raises(UserError, match="qkv has 8 outputs for 4 inputs"):
        find_scope(Classifier(attention, 1), "merged")


def test_checkpoint_of_task_attention_is_its_merged_point() -> None:
    model, other = after_two_tasks(TaskAttention()), after_two_tasks(TaskAttention())
    other.attention.qkv.load_state_dict(model.attention.qkv.state_dict())
    with torch.no_grad():
        other.attention.lora_B_k[1].weight.add_(1)
    problem = Problem(model, rows(4), CROSS_ENTROPY, scope="merged")
    expected = Problem(other, rows(4), CROSS_ENTROPY, scope="merged")
    point = checkpoint_point(problem, other.state_dict())
    torch.testing.assert_close(point, problem.flatten(expected.variables, torch.float64), rtol=1e-13, atol=1e-14)
    assert torch.equal(model_point(problem, expected), point)


@pytest.mark.third_party
def test_inflora_attention_is_measured_in_both_spaces(upstream: Callable[[str], Path]) -> None:
    module = import_file(upstream("InfLoRA") / "models" / "vit_inflora.py", "inflora_vit")
    model = after_two_tasks(module.Attention_LoRA(4, num_heads=2, r=2, n_tasks=3))
    problem = Problem(model, rows(4, 3), CROSS_ENTROPY, scope="adapter")
    assert problem.scope.names == ("attention.lora_B_k.1.weight", "attention.lora_B_v.1.weight")
    torch.testing.assert_close(all_products(HessianOperator(problem)), dense_hessian(problem), rtol=1e-9, atol=1e-11)
    check_task_attention(model, rows(4, 3), 4)


@pytest.mark.third_party
def test_inflora_transformer_is_measured_merged(upstream: Callable[[str], Path]) -> None:
    module = import_file(upstream("InfLoRA") / "models" / "vit_inflora.py", "inflora_vit")
    blocks = nn.ModuleList(module.Block(4, num_heads=2, r=2, n_tasks=2) for _ in range(2))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.reshape(-1, 1, 4).repeat(1, 2, 1) * x.new_tensor([[1.0], [-2.0]])
            for block in self.blocks:
                tokens = block(tokens, 1)
            return tokens.mean(1)

    model = randomised(Encoder()).double()
    problem = Problem(model, rows(4, 3), CROSS_ENTROPY, scope="merged")
    assert problem.loss() == pytest.approx(model_loss_of(model, rows(4, 3)), rel=1e-13)
    assert problem.scope.names == tuple(f"blocks.{i}.attn.{name}.merged" for i in range(2) for name in "kv")
    assert HessianOperator(problem).disagreement_with_differences() < 1e-5


# --- a transformer that hands adapters to its attentions, like CL-LoRA's


class UpAndDown(nn.Module):
    """CL-LoRA's names: lora_B goes down to the rank and lora_A up from it."""

    def __init__(self, width: int, r: int) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(r, width, bias=False), nn.Linear(width, r, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_A(self.lora_B(x))


class AdaptedAttention(nn.Module):
    def __init__(self, width: int, msa: list[int]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.msa = msa

    def forward(
        self, x: Tensor, adapt: Any = None, prompt: Any = None, rank_prompt: Any = None, block_weight: Any = None
    ) -> Tensor:
        parts = []
        for index, projection in enumerate((self.q_proj, self.k_proj, self.v_proj)):
            part = projection(x)
            if adapt is not None and self.msa[index]:
                part = part + (1 if block_weight is None else block_weight[index]) * adapt[index](x)
            parts.append(part)
        q, k, v = parts
        return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v


class AdaptedTransformer(nn.Module):
    """Three blocks: one with a shared adapter, one with its own and a block weight, one without."""

    def __init__(self, width: int = 4, r: int = 2, msa: tuple[int, ...] = (1, 0, 1)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": AdaptedAttention(width, list(msa))}) for _ in range(3))
        self.general_pos, self.specfic_pos, self.adapt_pos = [0], [2], [0, 2]
        self.use_block_weight = True
        self.block_weight = nn.Parameter(torch.rand(3, 1) + 0.5)
        self.cur_adapter = nn.ModuleList(
            nn.ModuleList(UpAndDown(width, r) if use else nn.Identity() for use in msa) for _ in self.adapt_pos
        )
        self.earlier = nn.ModuleList(UpAndDown(width, r) if use else nn.Identity() for use in msa)
        self.with_earlier = False

    def once(self, x: Tensor, own: nn.ModuleList, weight: Tensor) -> Tensor:
        x = x + self.blocks[0].attn(x, self.cur_adapter[0])
        x = x + self.blocks[1].attn(x)
        return x + self.blocks[2].attn(x, own, None, None, weight)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 1, 4).repeat(1, 2, 1) * x.new_tensor([[1.0], [-2.0]])
        out = self.once(tokens, self.cur_adapter[1], self.block_weight[:, 0])
        if self.with_earlier:
            out = out + self.once(tokens, self.earlier, torch.ones(3))
        return out.mean(1)


def adapted(model: nn.Module | None = None) -> Any:
    return randomised(model or AdaptedTransformer()).double()


ADAPTED_NAMES = tuple(f"blocks.{i}.attn.{name}_proj.merged" for i in (0, 2) for name in "qv")


def test_adapted_transformer_is_measured_in_both_spaces() -> None:
    model = adapted()
    model.blocks.requires_grad_(False)
    adapter = Problem(model, rows(4, 3), CROSS_ENTROPY, scope="adapter")
    torch.testing.assert_close(all_products(HessianOperator(adapter)), dense_hessian(adapter), rtol=1e-9, atol=1e-11)
    check_adapted_transformer(model)


def check_adapted_transformer(model: Any) -> None:
    merged = Problem(model, rows(4, 3), CROSS_ENTROPY, scope="merged")
    assert merged.scope.names == ADAPTED_NAMES
    assert merged.loss() == pytest.approx(model_loss_of(model, rows(4, 3)), rel=1e-13)
    plain = copy.deepcopy(model)
    names, variables = [], iter(merged.variables)
    with torch.no_grad():
        for index, position in ((0, 0), (2, 1)):
            for j, name in ((0, "q"), (2, "v")):
                pair = model.cur_adapter[position][j]
                scale = 1.0 if index == 0 else model.block_weight[j, 0]
                weight = getattr(plain.blocks[index].attn, f"{name}_proj").weight
                weight += scale * pair.lora_A.weight @ pair.lora_B.weight
                torch.testing.assert_close(next(variables), weight, rtol=1e-13, atol=1e-14)
                plain.cur_adapter[position][j].lora_A.weight.zero_()
                names.append(f"blocks.{index}.attn.{name}_proj.weight")
    dense = dense_hessian(merged, plain, names)
    torch.testing.assert_close(all_products(HessianOperator(merged)), dense, rtol=1e-9, atol=1e-11)


def test_merged_transformer_keeps_the_adapters_of_earlier_tasks_as_they_are() -> None:
    model = adapted()
    model.with_earlier = True
    problem = Problem(model, rows(4, 3), CROSS_ENTROPY, scope="merged")
    assert problem.scope.names == ADAPTED_NAMES
    assert problem.loss() == pytest.approx(model_loss_of(model, rows(4, 3)), rel=1e-13)
    assert HessianOperator(problem).disagreement_with_differences() < 1e-5


def test_merged_transformer_refuses_other_block_weights_than_it_holds() -> None:
    model = adapted()
    once = model.once
    model.once = lambda x, own, weight: once(x, own, weight + 1)
    with pytest.raises(UserError, match="blocks.2.attn with other block weights"):
        Problem(model, rows(4), CROSS_ENTROPY, scope="merged")


def test_merged_transformer_needs_projections_it_knows() -> None:
    model = adapted()
    model.blocks[2].attn.v_proj = nn.Identity()
    with pytest.raises(UserError, match="blocks.2.attn needs q_proj, k_proj and v_proj"):
        find_scope(model, "merged")


def test_a_factor_pair_named_the_other_way_round_has_its_rank_on_the_other_side() -> None:
    model = adapted()
    model.blocks.requires_grad_(False)
    axes = unit_axes(Problem(model, rows(4), CROSS_ENTROPY, scope="adapter"))
    assert axes["cur_adapter.0.0.lora_A.weight"] == 1  # (width, rank)
    assert axes["cur_adapter.0.0.lora_B.weight"] == 0  # (rank, width)
    assert rank_axis("0.lora_A.weight", {"0.lora_A.weight": (2, 4), "0.lora_B.weight": (3, 2)}) == 0
    assert rank_axis("0.lora_B.weight", {"0.lora_A.weight": (2, 4), "0.lora_B.weight": (1, 2)}) == 1
    assert rank_axis("0.weight", {"0.weight": (2, 4)}) is None


def cllora_transformer(checkout: Path) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Upstream's transformer with an adapter and a block weight in each of its two blocks, and images."""
    module = import_file(checkout / "backbone" / "vit_cllora.py", "cllora_vit")
    sizes = {"d_model": 4, "attn_bn": 2, "ffn_num": 2, "vpt_num": 0}
    options = {"ffn_adapter_init_option": "lora", "ffn_adapter_scalar": "1.0", "ffn_adapter_layernorm_option": "none"}
    flags = {"ffn_adapt": True, "vpt_on": False, "msa_adapt": True, "use_distillation": True, "use_block_weight": True}
    # Its shared adapters ask for a GPU; those with a block weight do not.
    positions = {"general_pos": [], "specfic_pos": [0, 1], "msa": [1, 0, 1], "_device": "cpu"}
    config = SimpleNamespace(**sizes, **options, **flags, **positions)
    model = module.VisionTransformer(
        img_size=4, patch_size=2, embed_dim=4, depth=2, num_heads=2, num_classes=0, tuning_config=config
    )
    randomised(model).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("cur_adapter" in name)
    return model, [(torch.randn(n, 3, 4, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (4, 3)]


@pytest.mark.third_party
def test_cllora_transformer_is_measured_in_both_spaces(upstream: Callable[[str], Path]) -> None:
    model, batches = cllora_transformer(upstream("CL-LoRA"))
    adapter = Problem(model, batches, CROSS_ENTROPY, scope="adapter")
    torch.testing.assert_close(all_products(HessianOperator(adapter)), dense_hessian(adapter), rtol=1e-9, atol=1e-11)
    merged = Problem(model, batches, CROSS_ENTROPY, scope="merged")
    names = [f"blocks.{i}.attn.{name}_proj" for i in range(2) for name in "qv"]
    assert merged.scope.names == tuple(f"{name}.merged" for name in names)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for i in range(2):
            for j, name in ((0, "q"), (2, "v")):
                pair = plain.cur_adapter[i][j]
                weight = getattr(plain.blocks[i].attn, f"{name}_proj").weight
                weight += plain.block_weight[j, i] * pair.lora_A.weight @ pair.lora_B.weight
                pair.lora_A.weight.zero_()
    dense = dense_hessian(merged, plain, [f"{name}.weight" for name in names])
    torch.testing.assert_close(all_products(HessianOperator(merged)), dense, rtol=1e-9, atol=1e-11)
    # With an earlier task's adapters and block weights in the forward, as in its test.
    model.add_adapter_to_list()
    randomised(model).double()
    problem = Problem(
        model, batches, lambda m, b: F.cross_entropy(m.forward_test(b[0])[-1][:, 0], b[1]), scope="merged"
    )
    assert HessianOperator(problem).disagreement_with_differences() < 1e-5
