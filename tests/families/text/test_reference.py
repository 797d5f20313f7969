"""The reference methods: penalties by hand, then the adapters, the loop, the data and whole tasks on a tiny T5.

The ladder: hand-worked matrices and finite differences for the penalties, exact equalities for what must stay
frozen or repeat, and in test_reference_upstream.py the authors' own code.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from flatpatch.errors import FlatpatchError, UserError
from flatpatch.families.text.data import check_benchmark
from flatpatch.families.text.reference import METHODS, ReferenceTask, adapters, learn, prepare, run_task, whole
from flatpatch.families.text.reference.adapters import LayerMatrices
from flatpatch.families.text.reference.data import Example, load_examples, make_collate, read_instructions
from flatpatch.families.text.reference.evaluate import exact_match, normalise, predict
from tests.reference_cases import TASKS, make_data, make_model, make_task

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-t5")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("benchmark"))


def losses_of(task: ReferenceTask, **options: Any) -> list[float]:
    steps: list[dict[str, Any]] = []
    run_task(task, on_step=steps.append, **options)
    return [step["loss"] for step in steps]


def saved(task: ReferenceTask) -> dict[str, Tensor]:
    pairs = adapters.load(task.output_dir / "adapter").pairs
    return {f"{key}.{part}": value for key, pair in pairs.items() for part, value in pair._asdict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys() and left
    assert all(torch.equal(left[key], right[key]) for key in left)


# Penalties: A is r x in, B is out x r. By hand A B = [[1 - 6, 0 + 2], [0 + 3, 0 - 1]]: absolute entries sum to 11.
A = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64)
B = torch.tensor([[1.0, 0.0], [-3.0, 1.0]], dtype=torch.float64)
A_OLD = torch.tensor([[2.0, -1.0], [0.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
# A_old A^T = [[2-2, 0+1], [6, -3], [3, -1]]: absolute entries sum to 14. |A|_2^2 = 6, |B|_2^2 = 11.


def test_nlora_penalty_of_the_hand_worked_matrices() -> None:
    layers = [LayerMatrices(A, B, None), LayerMatrices(2 * A, B, A_OLD)]
    torch.testing.assert_close(
        METHODS["nlora"].penalty(layers, 0.5, 9.0), torch.tensor(0.5 * (11 + 22), dtype=torch.float64)
    )


def test_olora_penalty_of_the_hand_worked_matrices() -> None:
    layers = [LayerMatrices(A, B, A_OLD), LayerMatrices(2 * A, B, None)]
    expected = 0.5 * 14 + 0.25 * (6**0.5 + 11**0.5 + 24**0.5 + 11**0.5)
    torch.testing.assert_close(METHODS["olora"].penalty(layers, 0.5, 0.25), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("method", ["seqlora", "inclora"])
def test_methods_without_a_penalty_add_exactly_nothing(method: str) -> None:
    assert METHODS[method].penalty([LayerMatrices(A, B, A_OLD)], 0.5, 0.25) == 0


def test_nlora_refuses_layers_whose_sizes_differ() -> None:
    with pytest.raises(ValueError, match="in = out, got in=2, out=3"):
        METHODS["nlora"].penalty([LayerMatrices(A, torch.ones(3, 2, dtype=torch.float64), None)], 1.0, 0.0)


@pytest.mark.parametrize("method", ["nlora", "olora"])
@pytest.mark.parametrize("rank", [1, 3])
def test_penalty_gradient_matches_finite_differences(method: str, rank: int) -> None:
    old = torch.randn(2, 5, dtype=torch.float64)
    start = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((rank, 5), (5, rank))]
    assert torch.autograd.gradcheck(lambda a, b: METHODS[method].penalty([LayerMatrices(a, b, old)], 0.7, 0.3), start)


@pytest.mark.parametrize("method", ["nlora", "olora"])
def test_penalty_gradient_is_finite_where_b_is_zero(method: str) -> None:
    a = A.clone().requires_grad_()
    b = torch.zeros_like(B).requires_grad_()
    METHODS[method].penalty([LayerMatrices(a, b, A_OLD)], 0.5, 0.5).backward()
    assert a.grad is not None and b.grad is not None
    assert torch.isfinite(a.grad).all() and torch.equal(b.grad, torch.zeros_like(b))


# Adapters


def logits_of(model: Any) -> Tensor:
    torch.manual_seed(3)
    ids = torch.randint(3, 20, (2, 6))
    result: Tensor = model.eval()(input_ids=ids, labels=ids[:, :3].contiguous()).logits
    return result


def test_new_adapter_changes_nothing_at_the_start(model: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    adapted, tokenizer = prepare(make_task(model, data, tmp_path))
    plain = AutoModelForSeq2SeqLM.from_pretrained(model)
    plain.resize_token_embeddings(len(tokenizer))
    assert torch.equal(logits_of(adapted), logits_of(plain))


def test_two_joined_adapters_act_as_the_sum_of_both(model: Path, data: Path, tmp_path: Path) -> None:
    first = make_task(model, data, tmp_path / "1", method="inclora")
    run_task(first)
    second = make_task(model, data, tmp_path / "2", 1, method="inclora", previous=tmp_path / "1" / "adapter")
    adapted, tokenizer = prepare(second)
    learn(adapted, tokenizer, second)
    pair = adapters.joined(adapted)["decoder.block.0.layer.0.SelfAttention.q"]
    layer = adapted.decoder.block[0].layer[0].SelfAttention.q.eval()
    x = torch.randn(4, 32)
    update = 32 / 3 * sum(torch.outer(pair.B[:, i], pair.A[i]) for i in range(6))
    torch.testing.assert_close(layer(x), x @ (layer.weight + update).T, rtol=1e-5, atol=1e-5)


def test_both_paths_see_the_same_dropped_input() -> None:
    base = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 6, bias=False)})
    pairs = {"q": adapters.Pair(torch.randn(2, 6), torch.randn(6, 2))}
    opposite = {"q": adapters.Pair(pairs["q"].A, -pairs["q"].B)}
    adapters.attach(base, r=2, alpha=4, dropout=0.5, old=pairs, new=opposite)
    x = torch.randn(5, 6)
    torch.testing.assert_close(base["q"].train()(x), x @ base["q"].weight.T)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_only_the_new_adapter_moves(method: str, model: Path, data: Path, tmp_path: Path) -> None:
    run_task(make_task(model, data, tmp_path / "1", method=method))
    second = make_task(model, data, tmp_path / "2", 1, method=method, previous=tmp_path / "1" / "adapter")
    adapted, tokenizer = prepare(second)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    learn(adapted, tokenizer, second)
    moved = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".new." in name}
    assert moved == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("method", "rank"), [("nlora", 6), ("olora", 6), ("inclora", 6), ("seqlora", 3)])
def test_saved_rank_after_two_tasks(method: str, rank: int, model: Path, data: Path, tmp_path: Path) -> None:
    first = make_task(model, data, tmp_path / "1", method=method)
    second = make_task(model, data, tmp_path / "2", 1, method=method, previous=tmp_path / "1" / "adapter")
    run_task(first)
    run_task(second)
    before, after = saved(first), saved(second)
    assert {value.shape for value in after.values()} == {(rank, 32), (32, rank)}
    if rank == 6:
        assert all(
            torch.equal(after[key][:3] if key.endswith("A") else after[key][:, :3], before[key]) for key in after
        )


def test_each_tasks_a_starts_from_other_numbers(model: Path, data: Path, tmp_path: Path) -> None:
    run_task(make_task(model, data, tmp_path / "1"))
    first, _ = prepare(make_task(model, data, tmp_path / "1"))
    second, _ = prepare(make_task(model, data, tmp_path / "2", 1, previous=tmp_path / "1" / "adapter"))
    starts = zip(adapters.layer_matrices(first), adapters.layer_matrices(second), strict=True)
    assert not any(torch.equal(one.A, other.A) for one, other in starts)


def test_an_interrupted_save_leaves_the_earlier_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"method": "nlora", "lora_r": 1, "lora_alpha": 2}
    adapter = adapters.Adapter({"q": adapters.Pair(torch.ones(1, 2), torch.zeros(2, 1))}, made)
    adapters.save(tmp_path, adapter)

    def broken(path: Path, _content: bytes) -> None:
        with path.open("wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", broken)
    with pytest.raises(KeyboardInterrupt):
        adapters.save(tmp_path, adapter)
    loaded = adapters.load(tmp_path)
    assert loaded.made == made and torch.equal(loaded.pairs["q"].A, torch.ones(1, 2))


# The loop


def test_same_arguments_give_the_same_losses_and_weights(model: Path, data: Path, tmp_path: Path) -> None:
    one, other = make_task(model, data, tmp_path / "a"), make_task(model, data, tmp_path / "b")
    assert losses_of(one) == losses_of(other)
    assert_same(saved(one), saved(other))
    assert losses_of(dataclasses.replace(one, seed=43)) != losses_of(other)


@pytest.mark.slow
def test_a_sequence_continued_in_fresh_processes_equals_an_undisturbed_one(
    model: Path, data: Path, tmp_path: Path
) -> None:
    def sequence(name: str) -> tuple[ReferenceTask, ReferenceTask]:
        first = make_task(model, data, tmp_path / name / "1", method="olora", lamda_2=0.1)
        previous = first.output_dir / "adapter"
        return first, make_task(model, data, tmp_path / name / "2", 1, method="olora", lamda_2=0.1, previous=previous)

    here, apart = sequence("here"), sequence("apart")
    losses = [loss for task in here for loss in losses_of(task)]
    script = (
        "import sys, pickle, torch; torch.set_num_threads(1)\n"
        "from flatpatch.families.text.reference import run_task\n"
        "task = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "run_task(task, on_step=lambda step: print('loss', step['loss'].hex(), flush=True))\n"
    )
    import pickle

    printed = []
    for task in apart:
        words = [sys.executable, "-c", script, pickle.dumps(task).hex()]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        printed += [line.split()[1] for line in done.stdout.splitlines() if line.startswith("loss")]
    assert printed == [loss.hex() for loss in losses]
    assert_same(saved(here[1]), saved(apart[1]))
    predictions = [(task.output_dir / "predictions.jsonl").read_text() for task in (here[1], apart[1])]
    assert predictions[0] == predictions[1]


def test_incremental_is_olora_without_its_penalties(model: Path, data: Path, tmp_path: Path) -> None:
    run_task(make_task(model, data, tmp_path / "1i", method="inclora"))
    run_task(make_task(model, data, tmp_path / "1o", method="olora", lamda_1=0.0, lamda_2=0.0))
    inclora = make_task(model, data, tmp_path / "i", 1, method="inclora", previous=tmp_path / "1i" / "adapter")
    olora = make_task(
        model, data, tmp_path / "o", 1, method="olora", lamda_1=0.0, lamda_2=0.0, previous=tmp_path / "1o" / "adapter"
    )
    assert losses_of(inclora) == losses_of(olora)
    assert_same(saved(inclora), saved(olora))


def test_sequential_lora_goes_on_where_it_left(model: Path, data: Path, tmp_path: Path) -> None:
    first = make_task(model, data, tmp_path / "1", method="seqlora")
    run_task(first)
    adapted, _ = prepare(
        make_task(model, data, tmp_path / "2", 1, method="seqlora", previous=first.output_dir / "adapter")
    )
    pairs = adapters.joined(adapted)
    assert_same({f"{k}.{part}": v for k, pair in pairs.items() for part, v in pair._asdict().items()}, saved(first))


def test_steps_count_uneven_last_batches(model: Path, data: Path, tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = []
    run_task(make_task(model, data, tmp_path, num_train_epochs=2), on_step=steps.append)
    # 22 examples in batches of 4: six batches an epoch, the last of two.
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert {(step["total"], step["learning_rate"]) for step in steps} == {(12, 1e-3)}
    assert all(float(step["seconds"]) > 0 for step in steps)


def test_one_example_and_rank_one_train(model: Path, data: Path, tmp_path: Path) -> None:
    task = make_task(model, data, tmp_path, lora_r=1, max_train_samples=1, num_train_epochs=30, lora_dropout=0.0)
    losses = losses_of(task)
    assert len(losses) == 30 and losses[-1] < losses[0]


def test_accumulated_batches_give_the_mean_of_their_gradients(data: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "t5", dropout=0.0)
    found: list[list[Tensor]] = []

    def make_gradients(optimizer: torch.optim.Optimizer) -> Callable[[Callable[..., Tensor]], Tensor]:
        def gradients(closure: Callable[..., Tensor]) -> Tensor:
            loss = closure()
            found.append([loss, *(p.grad.clone() for group in optimizer.param_groups for p in group["params"])])
            return loss

        return gradients

    common = {"lora_dropout": 0.0, "max_train_samples": 8, "method": "olora", "lamda_2": 0.1}
    whole = make_task(model, data, tmp_path / "a", per_device_train_batch_size=8, **common)
    parts = make_task(model, data, tmp_path / "b", gradient_accumulation_steps=2, **common)
    assert losses_of(whole, make_gradients=make_gradients) == pytest.approx(
        losses_of(parts, make_gradients=make_gradients)
    )
    # Each answer is a word and its closing token: batches of four weigh the same, and so does the penalty, once.
    assert len(found) == 2
    torch.testing.assert_close(*found)


def test_training_has_dropout_and_depends_on_the_seed_alone(model: Path, data: Path, tmp_path: Path) -> None:
    task = make_task(model, data, tmp_path)
    adapted, tokenizer = prepare(task)
    torch.manual_seed(0)
    steps: list[tuple[float, bool]] = []
    learn(adapted, tokenizer, task, on_step=lambda step: steps.append((step["loss"], adapted.training)))
    assert steps == [(loss, True) for loss in losses_of(task)]


def test_gradients_may_call_the_closure_twice(model: Path, data: Path, tmp_path: Path) -> None:
    seen: list[tuple[float, float, float]] = []

    def make_gradients(optimizer: torch.optim.Optimizer) -> Callable[[Callable[..., Tensor]], Tensor]:
        assert [group["name"] for group in optimizer.param_groups] == ["A", "B"]

        def gradients(closure: Callable[..., Tensor]) -> Tensor:
            state = torch.get_rng_state()
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            first = closure(penalised=False)
            unpenalised = torch.cat([p.grad.flatten() for p in parameters])
            torch.set_rng_state(state)
            loss = closure()
            penalised = torch.cat([p.grad.flatten() for p in parameters])
            seen.append((first.item(), loss.item(), float((penalised - unpenalised).norm())))
            return loss

        return gradients

    plain = losses_of(make_task(model, data, tmp_path / "a"))
    assert losses_of(make_task(model, data, tmp_path / "b"), make_gradients=make_gradients) == plain
    assert [first for first, _, _ in seen] == plain == [loss for _, loss, _ in seen]
    assert all(difference > 0 for _, _, difference in seen[1:])  # the penalty's part of the gradient


def test_only_the_final_gradient_is_clipped(model: Path, data: Path, tmp_path: Path) -> None:
    norms: list[float] = []

    def make_gradients(optimizer: torch.optim.Optimizer) -> Callable[[Callable[..., Tensor]], Tensor]:
        def gradients(closure: Callable[..., Tensor]) -> Tensor:
            loss = closure()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad *= 1e6
            norms.append(1.0)
            return loss

        step = optimizer.step

        def checked_step() -> None:
            squares = [p.grad.square().sum() for group in optimizer.param_groups for p in group["params"]]
            norms[-1] = float(torch.stack(squares).sum().sqrt())
            step()

        optimizer.step = checked_step  # type: ignore[method-assign, assignment]
        return gradients

    losses_of(make_task(model, data, tmp_path, max_grad_norm=0.5), make_gradients=make_gradients)
    assert norms == pytest.approx([0.5] * 6, rel=1e-4)


def test_a_loss_that_is_no_number_stops_the_run(model: Path, data: Path, tmp_path: Path) -> None:
    def make_gradients(optimizer: torch.optim.Optimizer) -> Callable[[Callable[..., Tensor]], Tensor]:
        return lambda closure: closure() * float("nan")

    with pytest.raises(FlatpatchError, match="the loss is nan at step 1 of 6") as caught:
        run_task(make_task(model, data, tmp_path), make_gradients=make_gradients)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "all_results.json").exists()


# Data


def test_prompt_has_upstreams_shape(data: Path) -> None:
    example = load_examples(data, [TASKS[0]], "train", {"TC": "Which?\n"})[0]
    sentence = json.loads((data / "TC/topics/train.json").read_text())[0]["sentence"]
    options = "Option: Sports, Science, Trade \n"
    assert example.prompt == f"Task:TC\nDataset:topics\nWhich?\n{options}{sentence}\nAnswer:"


def test_copa_is_asked_without_instruction_or_options(tmp_path: Path) -> None:
    folder = tmp_path / "COPA" / "COPA"
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text('["A", "B"]')
    (folder / "test.json").write_text('[{"sentence": "Why? A: {x} B: y", "label": "A"}]')
    assert load_examples(tmp_path, [("COPA", "COPA")], "test")[0].prompt == (
        "Task:COPA\nDataset:COPA\nWhy? A: {x} B: y\nAnswer:"
    )


def test_batches_are_padded_and_padding_is_ignored(model: Path) -> None:
    from transformers import AutoTokenizer

    collate = make_collate(AutoTokenizer.from_pretrained(model), 4, 50)
    examples = [Example("TC", "topics", "the day", "Sports"), Example("TC", "topics", "the day we saw", "Sports and")]
    batch = collate(examples)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["input_ids"][1, -1] == 1  # shortened, and closed all the same
    assert batch["labels"][0].tolist()[1:] == [1, -100]


def test_instruction_file_in_upstreams_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "instructions.json"
    entries = [
        {"instruction_type": "few-shot", "instruction": "no"},
        {"instruction_type": "zero-shot", "instruction": "yes"},
    ]
    path.write_text(json.dumps({"TC": entries}))
    assert read_instructions(path) == {"TC": "yes"}
    path.write_text('{"TC": []}')
    with pytest.raises(UserError, match="is not an instruction file"):
        read_instructions(path)


def test_unknown_task_type_names_the_known_ones(data: Path) -> None:
    with pytest.raises(UserError, match="no instruction for task type 'TC'; known: SC"):
        load_examples(data, [TASKS[0]], "train", {"SC": ""})


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train.json", None, "train.json cannot be read: No such file"),
        ("train.json", "", "train.json is empty"),
        ("train.json", '[{"label": "Sports", "sen', "train.json is not complete JSON: .* of 25 characters"),
        ("train.json", "version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("train.json", "[]", "holds no instances"),
        ("train.json", '{"label": "Sports"}', "holds no instances"),
        ("train.json", '[{"label": "Sports"}]', "instance 0: expected an object with the text 'sentence'"),
        ("train.json", '[{"label": 3, "sentence": "a"}]', "instance 0: expected an object with the text 'label'"),
        ("train.json", '[{"label": "Sport", "sentence": "a"}]', r"label 'Sport' is not in labels.json \(Sports, Sci"),
        ("labels.json", None, "labels.json cannot be read"),
        ("labels.json", "[1]", "holds no labels"),
        ("test.json", "[", "test.json is not complete JSON"),
    ],
)
def test_bad_data_is_refused_before_the_start(file: str, text: str | None, message: str, tmp_path: Path) -> None:
    path = make_data(tmp_path) / "TC" / "topics" / file
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        check_benchmark(tmp_path, [(*TASKS[0], "train"), (*TASKS[1], "train"), (*TASKS[0], "test")])
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (make_data(tmp_path) / "TC/topics/train.json").write_bytes(b"[\xff]")
    with pytest.raises(UserError, match="not UTF-8 text: invalid start byte at byte 1"):
        check_benchmark(tmp_path, [(*TASKS[0], "train")])


def test_all_problems_of_the_data_are_told_at_once(tmp_path: Path) -> None:
    make_data(tmp_path)
    (tmp_path / "TC/topics/train.json").write_text("")
    (tmp_path / "SC/moods/test.json").unlink()
    with pytest.raises(UserError, match=r"2 problems(.|\n)*train.json is empty(.|\n)*moods/test.json cannot"):
        check_benchmark(tmp_path, [(*task, split) for task in TASKS for split in ("train", "test")])


def test_many_missing_files_are_one_line_that_counts_them(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_benchmark(tmp_path, [(*task, split) for task in TASKS for split in ("train", "test")])
    first = tmp_path / "TC/topics/train.json"
    assert f"{tmp_path} lacks 6 of the 6 files that the run reads (first: {first})." in str(caught.value)
    assert "\n" not in str(caught.value)
    (make_data(tmp_path) / "SC/moods/test.json").unlink()
    (tmp_path / "SC/moods/train.json").unlink()
    (tmp_path / "TC/topics/train.json").write_text("")
    with pytest.raises(UserError, match=r"2 problems(.|\n)*lacks 2 of the 6 files(.|\n)*train.json is empty"):
        check_benchmark(tmp_path, [(*task, split) for task in TASKS for split in ("train", "test")])


def test_a_missing_benchmark_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no benchmark folder at .*nowhere"):
        check_benchmark(tmp_path / "nowhere", [])


def test_test_labels_may_be_unknown_as_in_mnli(data: Path, tmp_path: Path) -> None:
    path = make_data(tmp_path) / "TC" / "topics" / "test.json"
    path.write_text('[{"label": "-", "sentence": "a"}]')
    check_benchmark(tmp_path, [(*TASKS[0], "test")])


# Exact match


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("  Very  Positive.", "very positive"), ("World\n", "world"), ("a-b", "ab"), ("...", ""), ("É!", "é")],
)
def test_normalised_answers(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


@given(st.text())
def test_normalising_twice_equals_normalising_once(answer: str) -> None:
    once = normalise(answer)
    assert normalise(once) == once or once != once.lower()  # some letters lower to others: "İ"


def test_exact_match_weighs_by_examples() -> None:
    examples = (
        [Example("TC", "a", "", "Sports")] * 3 + [Example("TC", "b", "", "good")] + [Example("WiC", "WiC", "", "x")]
    )
    scores = exact_match(examples, ["sports", "Sports.", "trade", "bad", "x"])
    assert scores == {
        "exact_match": 60.0,
        "exact_match_for_TC": 50.0,
        "exact_match_for_a": 66.6667,
        "exact_match_for_b": 0.0,
        "exact_match_for_WiC": 100.0,
    }


def test_exact_match_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 predictions for 0 examples"):
        exact_match([], [])


# Whole tasks


def test_a_task_that_is_learned_is_answered(data: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "t5", dropout=0.0)
    task = make_task(
        model, data, tmp_path, num_train_epochs=30, lora_dropout=0.0, learning_rate=5e-3, lamda_1=0.0, lora_r=8
    )
    calls: list[dict[str, int]] = []
    losses = losses_of(task, on_predict=calls.append)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert calls == [{"step": 1, "total": 2}, {"step": 2, "total": 2}]
    assert results["train_loss"] == pytest.approx(sum(losses) / len(losses))
    assert results["train_samples"] == results["predict_samples"] == 22
    assert results["predict_global_step"] == len(losses) == 180
    assert results["predict_exact_match"] == results["predict_exact_match_for_topics"]
    assert results["predict_exact_match"] == results["predict_exact_match_for_TC"] > 60  # 82 seen, chance 33
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    right = [normalise(row["label"]) == normalise(row["prediction"]) for row in rows]
    assert results["predict_exact_match"] == round(100 * sum(right) / 22, 4)


def test_prediction_draws_no_random_numbers(model: Path, data: Path, tmp_path: Path) -> None:
    task = make_task(model, data, tmp_path)
    adapted, tokenizer = prepare(task)
    adapted.train()  # as training leaves it
    before = torch.get_rng_state()
    predict(adapted, tokenizer, load_examples(data, [TASKS[0]], "test", limit=2), task)
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_method_is_told_the_known_ones(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown method 'nloar'. Did you mean 'nlora'"):
        run_task(make_task(model, data, tmp_path, method="nloar"))


def test_a_missing_model_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at .*nowhere"):
        run_task(make_task(tmp_path / "nowhere", data, tmp_path))


def test_a_missing_or_torn_adapter_is_named(model: Path, data: Path, tmp_path: Path) -> None:
    task = make_task(model, data, tmp_path / "2", 1, previous=tmp_path / "adapter")
    with pytest.raises(UserError, match="no adapter of an earlier task at"):
        run_task(task)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / adapters.FILE_NAME).write_bytes(b"torn")
    with pytest.raises(UserError, match="Run that task again"):
        run_task(task)


def test_an_adapter_of_other_settings_or_another_model_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    run_task(make_task(model, data, tmp_path / "1"))
    second = make_task(model, data, tmp_path / "2", 1, previous=tmp_path / "1" / "adapter")
    with pytest.raises(UserError, match="'lora_r': 3.*asks for .*'lora_r': 4"):
        run_task(dataclasses.replace(second, lora_r=4))
    with pytest.raises(UserError, match="asks for .*'method': 'olora'"):
        run_task(dataclasses.replace(second, method="olora"))
    other = make_model(tmp_path / "other-t5", d_kv=4)
    with pytest.raises(UserError, match="is of another model than .*other-t5"):
        run_task(dataclasses.replace(second, model=other))


# Every weight trained, other optimizers, other ranks


def whole_weights(task: ReferenceTask) -> dict[str, Tensor]:
    return load_file(task.output_dir / "adapter" / whole.FILE_NAME)


def test_full_tuning_moves_every_weight_and_begins_with_loras_loss(model: Path, data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"method": "seqlora", "lora_dropout": 0.0}
    full = make_task(model, data, tmp_path / "full", tuning="full", **changes)
    started, _ = prepare(full)
    before = {name: weight.detach().clone() for name, weight in started.named_parameters()}
    assert all(weight.requires_grad for weight in started.parameters())
    assert not adapters.layer_matrices(started)
    losses = losses_of(full)
    after = whole_weights(full)
    assert before.keys() == after.keys()
    # Buckets of relative positions that no text is long enough for have no gradient.
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == []
    lora = losses_of(make_task(model, data, tmp_path / "lora", **changes))
    assert losses[0] == lora[0]  # fresh adapters change nothing; the batches and dropout masks are the same
    assert losses[1] != lora[1]


def test_first_full_sgd_step_is_the_gradient_of_the_mean_loss(data: Path, tmp_path: Path) -> None:
    still = make_model(tmp_path / "t5", dropout=0.0)
    task = make_task(
        *(still, data, tmp_path / "out"),
        **{"method": "seqlora", "tuning": "full", "optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0},
        **{"per_device_train_batch_size": 22},
    )
    started, tokenizer = prepare(task)
    batch = make_collate(tokenizer, task.max_source_length, task.max_target_length)(
        load_examples(data, [TASKS[0]], "train")
    )
    expected = {name: weight.detach().clone() for name, weight in started.named_parameters()}
    started(**batch).loss.backward()
    for name, weight in started.named_parameters():
        expected[name] -= 0.3 * weight.grad
    assert len(losses_of(task)) == 1
    for name, value in whole_weights(task).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_full_tuning_goes_on_where_it_left_and_repeats(model: Path, data: Path, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        first = make_task(model, data, tmp_path / name / "1", method="seqlora", tuning="full")
        second = make_task(
            *(model, data, tmp_path / name / "2", 1),
            **{"method": "seqlora", "tuning": "full", "previous": tmp_path / name / "1" / "adapter"},
        )
        losses = losses_of(first)
        resumed, _ = prepare(second)
        assert_same({name: weight.detach() for name, weight in resumed.named_parameters()}, whole_weights(first))
        found.append((losses, losses_of(second), whole_weights(second)))
    assert found[0][:2] == found[1][:2]
    assert_same(found[0][2], found[1][2])


def test_whole_model_that_is_missing_or_of_another_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    full = {"method": "seqlora", "tuning": "full"}
    second = make_task(model, data, tmp_path / "2", 1, previous=tmp_path / "1" / "adapter", **full)
    with pytest.raises(UserError, match="no weights of an earlier task at .*Run that task again"):
        run_task(second)
    run_task(make_task(model, data, tmp_path / "1", **full))
    other = make_model(tmp_path / "other-t5", d_kv=4)
    with pytest.raises(UserError, match="model.safetensors is of another model: .* the first "):
        run_task(dataclasses.replace(second, model=other))


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16, 32])
def test_adapters_of_every_rank_train(rank: int, model: Path, data: Path, tmp_path: Path) -> None:
    task = make_task(model, data, tmp_path, method="seqlora", lora_r=rank, max_train_samples=4, max_predict_samples=1)
    assert len(losses_of(task)) == 1
    assert all(value.shape[0 if name.endswith(".A") else 1] == rank for name, value in saved(task).items())
    assert any(value.any() for name, value in saved(task).items() if name.endswith(".B"))


def test_sgd_takes_plain_steps_along_the_gradient(data: Path, tmp_path: Path) -> None:
    """A first step of size lr * g in B; A stays, whose gradient is zero while B is."""
    still = make_model(tmp_path / "t5", dropout=0.0)
    base = {"method": "seqlora", "lora_dropout": 0.0, "max_grad_norm": 0.0, "per_device_train_batch_size": 22}
    moved = []
    for name, rate in (("one", 0.1), ("two", 0.2)):
        task = make_task(still, data, tmp_path / name, optim="sgd", learning_rate=rate, **base)
        run_task(task)
        moved.append(saved(task))
    for name in moved[0]:
        torch.testing.assert_close(moved[1][name], moved[0][name] * (2 if name.endswith(".B") else 1))
