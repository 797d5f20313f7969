"""The encoder with a head for each task: its loss by hand, what may learn, and whole tasks on a tiny BERT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.families.text.reference import adapters, classifier, learn, prepare, run_task
from flatpatch.families.text.reference.classifier import Classifier
from flatpatch.families.text.reference.data import Example, load_examples
from flatpatch.families.training import Gradients
from flatpatch.sam import SAM
from tests.reference_cases import TASKS, make_data, make_encoder, make_task

TEXTS = ("the ball the goal", "atom", "we saw a shop of the day")
LABELS = ("Trade", "Sports", "Science")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("benchmark"))


def batch_of(model: Path, data: Path, texts: tuple[str, ...] = TEXTS) -> tuple[Classifier, dict[str, Tensor]]:
    made, tokenizer = prepare(make_task(model, data, Path("unused"), method="seqlora"))
    collate = classifier.make_collate(tokenizer, data, TASKS, 64)
    batch = collate([Example(*TASKS[0], text, label) for text, label in zip(texts, LABELS, strict=False)])
    return made.double().eval(), batch


def losses_of(task: Any, **options: Any) -> list[float]:
    steps: list[dict[str, Any]] = []
    run_task(task, on_step=steps.append, **options)
    return [step["loss"] for step in steps]


def learned(folder: Path) -> dict[str, Tensor]:
    pairs = adapters.load(folder / "adapter").pairs
    factors = {f"{key}.{part}": value for key, pair in pairs.items() for part, value in pair._asdict().items()}
    return factors | nn.ModuleDict(classifier.load_heads(folder / "adapter")).state_dict()


def test_loss_is_the_mean_over_the_texts_of_log_sum_exp_minus_the_right_logit(model: Path, data: Path) -> None:
    made, batch = batch_of(model, data)
    assert batch["labels"].tolist() == [2, 0, 1]  # by their places in labels.json
    vectors = made.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    head = made.heads["topics"]
    expected = []
    for row, mask, label in zip(vectors, batch["attention_mask"], batch["labels"], strict=True):
        words = [vector for vector, there in zip(row, mask, strict=True) if there]
        logits = head.weight @ (torch.stack(words).sum(dim=0) / len(words)) + head.bias
        expected.append(torch.log(torch.exp(logits).sum()) - logits[label])
    torch.testing.assert_close(made(**batch).loss, sum(expected) / 3, rtol=1e-12, atol=1e-12)


def test_a_text_is_answered_the_same_beside_a_longer_one(model: Path, data: Path) -> None:
    made, together = batch_of(model, data)
    alone = batch_of(model, data, TEXTS[1:2])[1]
    assert together["attention_mask"][1].tolist() != alone["attention_mask"][0].tolist()
    answers = [made(batch["input_ids"], batch["attention_mask"]).logits for batch in (together, alone)]
    torch.testing.assert_close(answers[0][1], answers[1][0], rtol=1e-10, atol=1e-12)


def test_fresh_adapters_leave_the_encoder_as_it_was(model: Path, data: Path) -> None:
    made, batch = batch_of(model, data)
    plain = classifier.load(model, made.heads, "topics").double().eval()
    assert torch.equal(made(**batch).logits, plain(**batch).logits)


def test_adapters_and_the_tasks_own_head_learn_and_nothing_else(model: Path, data: Path, tmp_path: Path) -> None:
    run_task(make_task(model, data, tmp_path / "1", method="seqlora"))
    task = make_task(model, data, tmp_path / "2", 1, method="seqlora", previous=tmp_path / "1" / "adapter")
    made, tokenizer = prepare(task)
    assert isinstance(made, Classifier) and list(made.heads) == ["topics", "moods"]
    before = {name: value.detach().clone() for name, value in made.named_parameters()}
    learn(made, tokenizer, task)
    changed = {name for name, value in made.named_parameters() if not torch.equal(value, before[name])}
    trainable = {name for name, value in made.named_parameters() if value.requires_grad}
    assert changed == trainable
    assert {name for name in trainable if ".lora_" not in name} == {"heads.moods.weight", "heads.moods.bias"}
    assert len(trainable) == 2 + 2 * 2 * 2  # two layers, query and value, two factors


def test_every_weight_but_the_other_heads_learns_where_all_are_trained(model: Path, data: Path, tmp_path: Path) -> None:
    how = {"method": "seqlora", "tuning": "full", "learning_rate": 1e-3}
    run_task(make_task(model, data, tmp_path / "1", **how))
    first = tmp_path / "1" / "adapter"
    task = make_task(model, data, tmp_path / "2", 1, **how, previous=first)
    made, tokenizer = prepare(task)
    assert isinstance(made, Classifier)
    plain = classifier.load(model, {}, "moods").state_dict()
    trained = {name: value.detach().clone() for name, value in made.named_parameters()}
    assert any(not torch.equal(trained[name], value) for name, value in plain.items() if name in trained)
    learn(made, tokenizer, task)
    changed = {name for name, value in made.named_parameters() if not torch.equal(value, trained[name])}
    frozen = {"heads.topics.weight", "heads.topics.bias"}
    assert {name for name, value in made.named_parameters() if not value.requires_grad} == frozen
    assert changed and not changed & frozen
    run_task(task)
    assert {path.name for path in (tmp_path / "2" / "adapter").iterdir()} == {"heads.safetensors", "model.safetensors"}


def test_biases_of_query_and_value_are_kept(model: Path, data: Path) -> None:
    made = batch_of(model, data)[0]
    layers = [layer for layer in made.modules() if isinstance(layer, adapters.TwoPathLinear)]
    assert len(layers) == 4 and all(layer.bias is not None for layer in layers)


@pytest.mark.parametrize("method", ["seqlora", "inclora", "nlora", "olora"])
def test_each_method_keeps_the_heads_and_adds_adapters_as_with_a_t5(
    method: str, model: Path, data: Path, tmp_path: Path
) -> None:
    run_task(make_task(model, data, tmp_path / "1", method=method, lamda_2=0.1))
    first = tmp_path / "1" / "adapter"
    run_task(make_task(model, data, tmp_path / "2", 1, method=method, lamda_2=0.1, previous=first))
    rank = 3 if method == "seqlora" else 6
    assert {len(pair.A) for pair in adapters.load(tmp_path / "2" / "adapter").pairs.values()} == {rank}
    one, two = (learned(tmp_path / name) for name in ("1", "2"))
    for part in ("topics.weight", "topics.bias"):
        assert torch.equal(one[part], two[part])
    results = json.loads((tmp_path / "2" / "all_results.json").read_text())
    assert {"predict_exact_match_for_topics", "predict_exact_match_for_moods"} <= results.keys()
    assert results["predict_samples"] == 44


def test_the_same_arguments_give_the_same_bits(model: Path, data: Path, tmp_path: Path) -> None:
    first = losses_of(make_task(model, data, tmp_path / "1", method="seqlora"))
    second = losses_of(make_task(model, data, tmp_path / "2", method="seqlora"))
    assert first == second
    assert (tmp_path / "1" / "predictions.jsonl").read_bytes() == (tmp_path / "2" / "predictions.jsonl").read_bytes()
    one, two = (learned(tmp_path / name) for name in ("1", "2"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    other = losses_of(make_task(model, data, tmp_path / "3", method="seqlora", seed=43))
    assert first != other


def test_sam_of_radius_zero_is_no_sam_bit_for_bit_and_of_another_is(model: Path, data: Path, tmp_path: Path) -> None:
    def sam(rho: float) -> Any:
        def make_gradients(optimizer: torch.optim.Optimizer) -> Gradients:
            return SAM(optimizer, rho=rho).gradients

        return make_gradients

    plain = losses_of(make_task(model, data, tmp_path / "off", method="seqlora"))  # dropout is on
    zero = losses_of(make_task(model, data, tmp_path / "0", method="seqlora"), make_gradients=sam(0.0))
    some = losses_of(make_task(model, data, tmp_path / "1", method="seqlora"), make_gradients=sam(0.5))
    assert plain == zero and plain != some
    off, on = learned(tmp_path / "off"), learned(tmp_path / "0")
    assert all(torch.equal(off[key], on[key]) for key in off)


def test_a_task_that_is_learned_is_answered_also_after_the_next_one(data: Path, tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert", dropout=0.0)
    how = {"method": "inclora", "num_train_epochs": 12, "learning_rate": 1e-2, "lora_dropout": 0.0, "lora_r": 8}
    run_task(make_task(model, data, tmp_path / "1", **how))
    run_task(make_task(model, data, tmp_path / "2", 1, **how, previous=tmp_path / "1" / "adapter"))
    first, second = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("1", "2"))
    assert first["predict_exact_match_for_topics"] > 60  # chance 33
    assert second["predict_exact_match_for_moods"] > 75  # chance 50
    rows = [json.loads(line) for line in (tmp_path / "2" / "predictions.jsonl").read_text().splitlines()]
    assert {row["prediction"] for row in rows[:22]} <= {"Sports", "Science", "Trade"}
    assert {row["prediction"] for row in rows[22:]} <= {"good", "bad"}


def test_prediction_draws_no_random_numbers_and_takes_any_order(model: Path, data: Path, tmp_path: Path) -> None:
    run_task(make_task(model, data, tmp_path / "1", method="seqlora"))
    previous = tmp_path / "1" / "adapter"
    task = make_task(model, data, tmp_path, 1, method="seqlora", previous=previous, per_device_eval_batch_size=5)
    made, tokenizer = prepare(task)
    assert isinstance(made, Classifier)
    made.train()  # as training leaves it
    questions = load_examples(data, TASKS, "test", None)
    before = torch.get_rng_state()
    calls: list[dict[str, int]] = []
    answers = classifier.predict(made, tokenizer, questions, task, calls.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert made.active == "moods"
    assert calls[-1] == {"step": 10, "total": 10}  # 22 of each in fives
    assert classifier.predict(made, tokenizer, questions[::-1], task) == answers[::-1]


def test_prompts_are_the_bare_sentences_and_each_data_set_is_cut_by_itself(data: Path) -> None:
    sentences = [json.loads((data / kind / name / "test.json").read_text())[:2] for kind, name in TASKS]
    found = load_examples(data, TASKS, "test", None, None, 2)
    assert [example.prompt for example in found] == [row["sentence"] for rows in sentences for row in rows]


def test_missing_or_torn_heads_are_named(model: Path, data: Path, tmp_path: Path) -> None:
    run_task(make_task(model, data, tmp_path / "1", method="seqlora"))
    heads = tmp_path / "1" / "adapter" / classifier.HEADS_NAME
    task = make_task(model, data, tmp_path / "2", 1, method="seqlora", previous=heads.parent)
    heads.write_bytes(b"torn")
    with pytest.raises(UserError, match="no heads of the earlier tasks at .*heads.safetensors.*Run that task again"):
        run_task(task)
    heads.unlink()
    with pytest.raises(UserError, match="no heads of the earlier tasks at"):
        run_task(task)


def test_saved_heads_are_read_back(tmp_path: Path, model: Path) -> None:
    heads = {"SST-2": nn.Linear(32, 2), "amazon": nn.Linear(32, 5)}
    classifier.save_heads(tmp_path, classifier.load(model, heads, "SST-2"))
    found = classifier.load_heads(tmp_path)
    assert {name: head.out_features for name, head in found.items()} == {"SST-2": 2, "amazon": 5}
    assert all(torch.equal(found[name].weight, head.weight) for name, head in heads.items())
    assert all(torch.equal(found[name].bias, head.bias) for name, head in heads.items())
