"""SAM around a Hugging Face Trainer's own ``training_step``, on a tiny T5 with LoRA, dropout and a penalty."""

from __future__ import annotations

import copy
import functools
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from flatpatch.errors import UserError
from flatpatch.sam import SAM, SAMTrainingStep, keep_adapters_fp32
from tests import sam_training
from tests.sam_memory import peak_bytes
from tests.sam_training import PENALTY, assert_same, make_trainer


def prepared(folder, sam=None, **settings):
    """A trainer and its wrapped step, with a batch, ready for single steps."""
    trainer = make_trainer(folder, **settings)
    step = SAMTrainingStep(trainer, **({"rho": 0.5} | (sam or {})))
    inputs = next(iter(trainer.get_train_dataloader()))
    return trainer, step, inputs


def adapters(trainer, letter=""):
    return [p for n, p in trainer.model.named_parameters() if f"lora_{letter}" in n and p.requires_grad]


def snapshot(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def unchanged(trainer, before):
    return all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize("gas", [1, 4])
@pytest.mark.parametrize("sam", [{}, {"adaptive": True}, {"ascent_loss": "task"}, {"scope": "A"}, {"sync": "global"}])
def test_rho_zero_equals_the_plain_step_bit_for_bit_with_dropout(tmp_path, gas, sam):
    plain = sam_training.train(tmp_path, gas=gas)
    assert_same(sam_training.train(tmp_path, gas=gas, sam={"rho": 0.0} | sam), plain)


def test_sam_trains_differently_from_the_plain_step(tmp_path):
    plain = sam_training.train(tmp_path)
    wrapped = sam_training.train(tmp_path, sam={"rho": 0.5})
    assert plain["losses"][0] == wrapped["losses"][0]  # the first loss is taken before any update
    assert plain["losses"][1:] != wrapped["losses"][1:]
    assert torch.equal(plain["random"], wrapped["random"])


@pytest.mark.parametrize("settings", [{}, {"adaptive": True, "eta": 0.1}, {"scope": "B"}])
def test_gradient_equals_that_of_the_closure_api(tmp_path, settings):
    trainer, step, inputs = prepared(tmp_path, settings, dropout=0.1)
    torch.manual_seed(1)
    loss = step(trainer.model, inputs)

    twin = make_trainer(tmp_path)
    chosen = adapters(twin, "B" if settings.get("scope") == "B" else "")
    options = {key: value for key, value in settings.items() if key != "scope"}
    sam = SAM(torch.optim.SGD(adapters(twin), lr=0.1), rho=0.5, parameters=chosen, **options)

    def closure():
        sam.zero_grad()
        twin.model.train()
        loss = twin.compute_loss(twin.model, inputs) + PENALTY * sum(p.abs().sum() for p in adapters(twin))
        loss.backward()
        return loss

    torch.manual_seed(1)
    assert sam.gradients(closure) == loss
    assert sam.perturbed_loss == step.perturbed_loss
    for ours, theirs in zip(adapters(trainer), adapters(twin), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_step_returns_unperturbed_loss(tmp_path):
    trainer, step, inputs = prepared(tmp_path, dropout=0.1)
    twin = make_trainer(tmp_path)
    torch.manual_seed(1)
    loss = step(trainer.model, inputs)
    torch.manual_seed(1)
    assert loss == twin.training_step(twin.model, inputs)
    assert step.perturbed_loss > loss
    assert not loss.requires_grad


def test_task_ascent_leaves_out_the_penalty_of_the_training_step(tmp_path):
    trainer, step, inputs = prepared(tmp_path, {"ascent_loss": "task"}, dropout=0.0)
    total = prepared(tmp_path, {"ascent_loss": "total"}, dropout=0.0)[1]
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    task_norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, adapters(trainer))]).double().norm()
    returned = step(trainer.model, inputs)
    assert step.last_step.grad_norm.item() == pytest.approx(task_norm.item(), rel=1e-5)
    assert returned > loss
    total(total.trainer.model, inputs)
    assert total.last_step.grad_norm.item() > 1.1 * task_norm.item()
    assert "compute_loss" not in vars(trainer)


@pytest.mark.parametrize("failing_pass", [1, 2])
@pytest.mark.parametrize("ascent_loss", ["total", "task"])
def test_weights_and_methods_are_restored_when_a_pass_raises(tmp_path, failing_pass, ascent_loss):
    trainer, step, inputs = prepared(tmp_path, {"ascent_loss": ascent_loss})
    before, backward, calls = snapshot(trainer), torch.Tensor.backward, []
    forward = trainer.model.forward

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == failing_pass:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    trainer.model.forward = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        step(trainer.model, inputs)
    assert len(calls) == failing_pass
    assert unchanged(trainer, before)
    assert torch.Tensor.backward is backward
    assert "compute_loss" not in vars(trainer)


def test_weights_without_a_second_gradient_are_restored(tmp_path):
    trainer, step, inputs = prepared(tmp_path)
    before, calls, plain = snapshot(trainer), [], trainer.compute_loss

    def compute_loss(model, inputs):
        calls.append(1)
        return plain(model, inputs) if len(calls) == 1 else torch.zeros((), requires_grad=True)

    trainer.compute_loss = compute_loss
    trainer.training_step = None
    step._plain_step = lambda model, inputs: _no_penalty_step(trainer, model, inputs)
    step(trainer.model, inputs)
    assert unchanged(trainer, before)
    assert step.last_step.perturbation_norm > 0
    assert all(parameter.grad is None for parameter in adapters(trainer))


def _no_penalty_step(trainer, model, inputs):
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return loss.detach()


def test_ascent_pass_writes_no_gradient_and_replays_the_random_numbers(tmp_path):
    trainer, step, inputs = prepared(tmp_path)
    step(trainer.model, inputs)
    first, second = trainer.passes
    assert not any(first["grads"]) and not any(second["grads"])
    assert torch.equal(first["draw"], second["draw"])
    assert all(parameter.grad is not None for parameter in adapters(trainer))


@pytest.mark.parametrize(("scope", "letters"), [("lora", "AB"), ("A", "A"), ("B", "B"), ("all", "ABh"), ("head", "h")])
def test_scope_chooses_what_moves(tmp_path, scope, letters):
    model = sam_training.tiny_t5(modules_to_save=["lm_head"])
    trainer, step, inputs = prepared(tmp_path, {"scope": scope}, model=model)
    before, seen = {n: p.detach().clone() for n, p in model.named_parameters()}, []

    def looking(model, inputs):
        seen.append({n for n, p in model.named_parameters() if not torch.equal(p, before[n])})
        return plain(model, inputs)

    plain, step._plain_step = step._plain_step, looking
    step(trainer.model, inputs)
    assert seen[0] == set()
    kinds = {"A" if "lora_A" in n else "B" if "lora_B" in n else "h" for n in seen[1]}
    assert kinds == set(letters)
    assert all(before[name].requires_grad is False for name in seen[1])
    assert all(p.requires_grad for n, p in model.named_parameters() if n in seen[1])


def test_empty_scope_is_refused_with_what_there_is(tmp_path):
    trainer, step, inputs = prepared(tmp_path, {"scope": "head"})
    with pytest.raises(UserError, match=r"scope=head chooses no weight: of 12 trainable .* there are A 6, B 6, head 0"):
        step(trainer.model, inputs)


@pytest.mark.parametrize("ascent_loss", ["total", "task"])
def test_peak_memory_is_that_of_the_plain_step_and_three_copies(tmp_path, ascent_loss):
    # A graph or gradient of the first pass that lived on in the second would nearly double it.
    trainer, step, inputs = prepared(tmp_path, {"ascent_loss": ascent_loss}, batch=32)
    trainer.state_before_pass = dict
    plain = peak_bytes(lambda: trainer.training_step(trainer.model, inputs))
    trainer.model.zero_grad()
    size = sum(parameter.numel() for parameter in adapters(trainer))
    random_states_and_rounding_of_allocations = 30_000
    work_area = 8 * size
    peak = peak_bytes(lambda: step(trainer.model, inputs))
    assert plain > 300_000
    assert peak <= plain + 3 * 4 * size + work_area + random_states_and_rounding_of_allocations


def test_accumulation_perturbs_every_micro_batch_on_its_own(tmp_path):
    # The reference sums, over micro-batches, SAM gradients of the loss divided by their number.
    trainer, step, _ = prepared(tmp_path, gas=2, dropout=0.0)
    parts = [inputs for inputs, _ in zip(trainer.get_train_dataloader(), range(2), strict=False)]
    for inputs in parts:
        step(trainer.model, inputs)
    expected = [torch.zeros_like(p) for p in adapters(trainer)]
    for inputs in parts:
        twin = make_trainer(tmp_path, dropout=0.0)
        sam = SAM(torch.optim.SGD(adapters(twin), lr=0.1), rho=0.5)

        def closure(sam=sam, twin=twin, inputs=inputs):
            sam.zero_grad()
            loss = twin.compute_loss(twin.model, inputs) / 2 + PENALTY * sum(p.abs().sum() for p in adapters(twin))
            loss.backward()
            return loss

        sam.gradients(closure)
        for total, parameter in zip(expected, adapters(twin), strict=True):
            total += parameter.grad
    for parameter, gradient in zip(adapters(trainer), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


def test_several_backward_calls_in_one_step_add_up(tmp_path):
    trainer, step, inputs = prepared(tmp_path, dropout=0.0)
    split = prepared(tmp_path, dropout=0.0)[1]

    def two_calls(model, inputs):
        model.train()
        loss = split.trainer.compute_loss(model, inputs)
        loss.backward(retain_graph=True)
        (PENALTY * sum(p.abs().sum() for p in adapters(split.trainer))).backward()
        return loss.detach()

    split._plain_step = two_calls
    step(trainer.model, inputs), split(split.trainer.model, inputs)
    torch.testing.assert_close(split.last_step.grad_norm, step.last_step.grad_norm, rtol=1e-5, atol=0)
    for ours, theirs in zip(adapters(trainer), adapters(split.trainer), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ascent_loss", ["total", "task"])
def test_loss_scale_of_a_grad_scaler_cancels(tmp_path, ascent_loss):
    plain, plain_step, inputs = prepared(tmp_path, {"ascent_loss": ascent_loss}, dropout=0.0)
    scaled, scaled_step, _ = prepared(tmp_path, {"ascent_loss": ascent_loss}, dropout=0.0)
    scaled.do_grad_scaling, scaled.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**16)
    plain_step(plain.model, inputs), scaled_step(scaled.model, inputs)
    # A power of two scales every float32 exactly.
    assert scaled_step.perturbed_loss == plain_step.perturbed_loss
    assert scaled_step.last_step.grad_norm == plain_step.last_step.grad_norm
    for ours, theirs in zip(adapters(scaled), adapters(plain), strict=True):
        assert torch.equal(ours.grad, theirs.grad * 2**16)


def test_ascent_gradient_that_is_not_finite_gives_a_counted_plain_step(tmp_path):
    trainer, step, inputs = prepared(tmp_path, dropout=0.0)
    twin = make_trainer(tmp_path, dropout=0.0)
    step(trainer.model, inputs)
    assert step.fallbacks == 0
    trainer.model.zero_grad()
    plain, calls = step._plain_step, []

    def overflowing(model, inputs):
        calls.append(1)
        if len(calls) > 1:
            return plain(model, inputs)
        loss = trainer.compute_loss(model, inputs) * float("inf")
        loss.backward()
        return loss.detach()

    step._plain_step = overflowing
    step(trainer.model, inputs)
    twin.training_step(twin.model, inputs)
    assert step.fallbacks == 1
    for ours, theirs in zip(adapters(trainer), adapters(twin), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("ascent_loss", ["total", "task"])
def test_reentrant_checkpointing_is_refused_with_the_fix(tmp_path, ascent_loss):
    # The penalty alone would give every weight some gradient, so looking for missing ones is not enough.
    trainer, step, inputs = prepared(tmp_path, {"ascent_loss": ascent_loss})
    before = snapshot(trainer)
    trainer.model.base_model.model.gradient_checkpointing_enable()
    trainer.model.enable_input_require_grads()
    with pytest.raises(UserError, match="reentrant gradient checkpointing.*Train without gradient_checkpointing"):
        step(trainer.model, inputs)
    assert unchanged(trainer, before)


def test_checkpointing_that_is_not_reentrant_gives_the_same_gradient(tmp_path, monkeypatch):
    plain, plain_step, inputs = prepared(tmp_path)
    saving, saving_step, _ = prepared(tmp_path)
    saving.model.base_model.model.gradient_checkpointing_enable()
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    monkeypatch.setattr("transformers.models.t5.modeling_t5.checkpoint", checkpoint)
    for trainer, step in ((plain, plain_step), (saving, saving_step)):
        torch.manual_seed(1)
        step(trainer.model, inputs)
    for ours, theirs in zip(adapters(saving), adapters(plain), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_all_missing_ascent_gradients_are_refused(tmp_path):
    trainer, step, inputs = prepared(tmp_path)
    elsewhere = nn.Parameter(torch.ones(()))
    step._plain_step = lambda model, inputs: elsewhere.square().backward()
    with pytest.raises(UserError, match="found no gradient for any of the 12 perturbed tensors"):
        step(trainer.model, inputs)
    step._plain_step = lambda model, inputs: torch.ones(()).backward()
    with pytest.raises(UserError, match="found no gradient for any of the 12 perturbed tensors"):
        step(trainer.model, inputs)


def test_groups_own_rho_scales_its_part_of_one_perturbation(tmp_path):
    trainer, step, inputs = prepared(tmp_path, dropout=0.0)
    A, B = adapters(trainer, "A"), adapters(trainer, "B")
    trainer.optimizer = torch.optim.SGD([{"params": A, "rho": 0.0}, {"params": B}], lr=0.1)
    loss = trainer.compute_loss(trainer.model, inputs) + PENALTY * sum(p.abs().sum() for p in [*A, *B])
    gradients = torch.autograd.grad(loss, [*A, *B])
    norms = [torch.cat([g.flatten() for g in part]).double().norm() for part in (gradients, gradients[len(A) :])]
    step(trainer.model, inputs)
    assert step.last_step.perturbation_norm.item() == pytest.approx((0.5 * norms[1] / norms[0]).item(), rel=1e-5)


def test_groups_own_rho_is_refused_under_deepspeed(tmp_path):
    trainer, step, inputs = prepared(tmp_path)
    trainer.deepspeed = FakeEngine(1.0, 1)
    trainer.optimizer = torch.optim.SGD([{"params": adapters(trainer), "rho": 0.1}], lr=0.1)
    with pytest.raises(UserError, match="cannot follow a parameter group's own rho under DeepSpeed"):
        step(trainer.model, inputs)


def test_sparse_embedding_gradients_give_the_dense_step(tmp_path):
    reports = []
    for sparse in (False, True):
        trainer, step, inputs = prepared(tmp_path, {"scope": "all"}, dropout=0.0)
        trainer.model.base_model.model.shared.weight.requires_grad_(True)
        for embedding in (m for m in trainer.model.modules() if isinstance(m, nn.Embedding)):
            embedding.sparse = sparse
        # Tied to the embedding, the output layer would make its gradient dense.
        head = trainer.model.base_model.model.lm_head
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        step(trainer.model, inputs)
        reports.append([value.item() for value in vars(step.last_step).values()] + [step.perturbed_loss.item()])
    assert reports[1] == pytest.approx(reports[0], rel=1e-5)


def test_training_step_without_backward_is_refused(tmp_path):
    trainer, step, inputs = prepared(tmp_path)
    step._plain_step = lambda model, inputs: trainer.compute_loss(model, inputs).detach()
    with pytest.raises(RuntimeError, match="made no backward call"):
        step(trainer.model, inputs)


def test_backward_calls_of_other_threads_are_left_alone(tmp_path):
    trainer, step, inputs = prepared(tmp_path)
    weight, plain = nn.Parameter(torch.ones(())), step._plain_step

    def with_another_thread(model, inputs):
        thread = threading.Thread(target=lambda: weight.square().backward())
        thread.start(), thread.join()
        return plain(model, inputs)

    step._plain_step = with_another_thread
    step(trainer.model, inputs)
    assert weight.grad == 4.0  # 2 from each pass


def test_zero_3_is_refused(tmp_path):
    trainer, step, inputs = prepared(tmp_path)
    trainer.deepspeed = SimpleNamespace(zero_optimization_stage=lambda: 3)
    with pytest.raises(UserError, match="ZeRO-3"):
        step(trainer.model, inputs)


@pytest.mark.parametrize("name", ["use_apex", "fsdp", "sharded_ddp"])
def test_what_shards_or_scales_in_its_own_way_is_refused(tmp_path, name):
    trainer, step, inputs = prepared(tmp_path)
    setattr(trainer, name, True)
    with pytest.raises(UserError, match="does not work with"):
        step(trainer.model, inputs)


@pytest.mark.parametrize("setting", [{"rho": -1.0}, {"scope": "b"}, {"ascent_loss": "loss"}, {"sync": "x"}])
def test_settings_out_of_range_are_refused(tmp_path, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SAMTrainingStep(make_trainer(tmp_path), **setting)


class Watching(TrainerCallback):
    """Keeps the weights at each event and what was saved."""

    def __init__(self):
        self.seen, self.saved = [], []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.seen.append([p.detach().clone() for p in model.parameters()])

    def on_save(self, args, state, control, model, **kwargs):
        self.saved.append([p.detach().clone() for p in model.parameters()])


def test_checkpoints_hold_unperturbed_weights_and_resume_bitwise(tmp_path, monkeypatch):
    # transformers 4.28 loads its random state with a torch.load that newer torch refuses without this.
    monkeypatch.setattr(torch, "load", functools.partial(torch.load, weights_only=False))
    watching = Watching()
    whole = make_trainer(tmp_path / "whole", steps=6, save_strategy="steps", save_steps=3, callbacks=[watching])
    whole.training_step = SAMTrainingStep(whole, rho=0.5)
    whole.train()
    saved = torch.load(tmp_path / "whole" / "checkpoint-3" / "pytorch_model.bin")
    names = [name for name, _ in whole.model.named_parameters()]
    for name, weight in zip(names, watching.seen[2], strict=True):
        assert torch.equal(saved[name], weight)

    resumed = make_trainer(tmp_path / "resumed", steps=6, model=sam_training.tiny_t5(seed=9))
    resumed.training_step = SAMTrainingStep(resumed, rho=0.5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_step_leaves_the_weights_as_they_were(tmp_path):
    trainer, step, inputs = prepared(tmp_path)
    before = snapshot(trainer)
    step(trainer.model, inputs)
    assert unchanged(trainer, before)


def test_clipping_sees_only_the_final_gradient(tmp_path):
    # Trainer's loop clips .grad between the step and the optimizer: nothing of the first pass may be in it.
    clipped = sam_training.train(tmp_path, steps=1, sam={"rho": 0.5}, max_grad_norm=1e-3, optim="sgd", dropout=0.0)
    free = sam_training.train(tmp_path, steps=1, sam={"rho": 0.5}, max_grad_norm=1e9, optim="sgd", dropout=0.0)
    start = {n: p for n, p in sam_training.tiny_t5(0.0).named_parameters()}
    moves = [torch.cat([(w - start[n]).flatten() for n, w in r["weights"].items()]).double() for r in (clipped, free)]
    assert moves[0].norm().item() == pytest.approx(0.01 * 1e-3, rel=1e-2)
    assert nn.functional.cosine_similarity(moves[0], moves[1], dim=0).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_adapters_stay_in_float32_through_one_cast_of_the_model(cast):
    model = sam_training.tiny_t5()
    before = {n: p for n, p in model.named_parameters()}
    for name, parameter in before.items():  # upstream freezes the factors of earlier tasks, beside the new ones
        parameter.requires_grad_("lora_B" in name)
    weights = copy.deepcopy({n: p.detach() for n, p in before.items()})
    keep_adapters_fp32(model)
    assert getattr(model, cast)() is model
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        if "lora_" in name:
            assert torch.equal(parameter, weights[name])
        else:
            assert parameter.dtype == getattr(torch, cast)
    assert not {"half", "bfloat16"} & vars(model).keys()
    getattr(model, cast)()
    assert {p.dtype for p in model.parameters()} == {getattr(torch, cast)}


class FakeEngine:
    """What the step asks of a DeepSpeed engine, with a loss scale as fp16 has one."""

    scale_wrt_gas = None

    def __init__(self, loss_scale, accumulation):
        self.optimizer = SimpleNamespace(loss_scale=loss_scale)
        self.accumulation = accumulation

    def zero_optimization_stage(self):
        return 2

    def gradient_accumulation_steps(self):
        return self.accumulation

    def backward(self, loss):
        loss = loss / self.accumulation
        (loss * self.optimizer.loss_scale).backward()
        return loss


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("ascent_loss", ["total", "task"])
def test_loss_scale_of_an_engine_cancels(tmp_path, accumulation, ascent_loss):
    steps = []
    for loss_scale in (1.0, 2.0**16):
        trainer, step, inputs = prepared(tmp_path, {"ascent_loss": ascent_loss}, dropout=0.0)
        trainer.deepspeed = FakeEngine(loss_scale, accumulation)
        trainer.state_before_pass = dict
        trainer._prepare_inputs = lambda inputs: inputs
        returned = step(trainer.model, inputs)
        assert "backward" not in vars(trainer.deepspeed)
        steps.append((returned, step.perturbed_loss, step.last_step.grad_norm, step.last_step.perturbation_norm))
    assert steps[0] == steps[1]
    plain = make_trainer(tmp_path, dropout=0.0)
    plain.deepspeed = FakeEngine(1.0, accumulation)
    plain.state_before_pass, plain._prepare_inputs = dict, lambda inputs: inputs
    assert plain.training_step(plain.model, inputs) == steps[0][0]
