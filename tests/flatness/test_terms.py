"""What a batch weighs: the value never depends on how the examples are batched, and a wrong weight is noticed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.families.text.hook import trainer_loss
from flatpatch.families.vision.hook import classification_loss
from flatpatch.flatness import Problem, WeightedLoss, model_loss, supervised_loss
from flatpatch.flatness.terms import count_terms, uneven_parts
from tests.flatness_cases import TinyTransformer, import_file, mlp, rows, token_batches, token_loss


def split(batch: Any, *sizes: int) -> list[Any]:
    """Cut a batch into batches of these sizes."""
    if isinstance(batch, dict):
        pieces = {key: value.split(list(sizes)) for key, value in batch.items()}
        return [{key: value[k] for key, value in pieces.items()} for k in range(len(sizes))]
    return list(zip(*(part.split(list(sizes)) for part in batch), strict=True))


# --- criteria of torch's

CLASS_WEIGHTS = torch.tensor([1.0, 7.0, 0.2], dtype=torch.float64)


def class_targets(ignored: int | None = None) -> Tensor:
    y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 1, 0, 2])
    if ignored is not None:
        y[[0, 1, 2, 9]] = ignored
    return y


def probabilities() -> Tensor:
    return torch.softmax(torch.randn(10, 3, dtype=torch.float64), dim=1)


CRITERIA: dict[str, tuple[Any, Callable[[], Tensor]]] = {
    "ignored": (nn.CrossEntropyLoss(ignore_index=255), lambda: class_targets(255)),
    "weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), class_targets),
    "both": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=255), lambda: class_targets(255)),
    "smoothed": (nn.CrossEntropyLoss(ignore_index=255, label_smoothing=0.2), lambda: class_targets(255)),
    "smoothed, weights": (
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=0, label_smoothing=0.2),
        lambda: class_targets(0),
    ),
    "probabilities": (nn.CrossEntropyLoss(label_smoothing=0.1), probabilities),
    "probabilities, weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), probabilities),
    "nll": (nn.NLLLoss(weight=CLASS_WEIGHTS, ignore_index=255), lambda: class_targets(255)),
    "function": (F.cross_entropy, lambda: class_targets(-100)),
    "partial": (
        functools.partial(F.cross_entropy, ignore_index=255, weight=CLASS_WEIGHTS),
        lambda: class_targets(255),
    ),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS), lambda: torch.eye(3, dtype=torch.float64)[class_targets()]),
    "divergence": (nn.KLDivLoss(reduction="batchmean"), probabilities),
    "divergence, mean": (functools.partial(F.kl_div, reduction="batchmean"), probabilities),
    "margin": (nn.MultiMarginLoss(weight=CLASS_WEIGHTS), class_targets),
    # Integers that are no classes: -100 and -1 are labels or padding here, and count.
    "margins": (nn.MultiLabelMarginLoss(), lambda: F.pad(class_targets()[:, None], (0, 2), value=-1)),
    "hinge": (nn.HingeEmbeddingLoss(), lambda: 1 - 2 * torch.eye(3, dtype=torch.long)[class_targets()]),
    "counts": (nn.PoissonNLLLoss(), lambda: torch.eye(3, dtype=torch.long)[class_targets()] - 100),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_value_of_a_criterion_does_not_depend_on_how_the_examples_are_batched(name: str) -> None:
    criterion, targets = CRITERIA[name]
    model, batch = mlp(), (torch.randn(10, 4, dtype=torch.float64), targets())
    loss = supervised_loss(criterion)
    whole = criterion(model.eval()(batch[0]), batch[1]).item()
    for sizes in ((10,), (3, 3, 4), (4, 6), (5, 5), (7, 1, 2)):
        parts = split(batch, *sizes)
        if any((part[1] == (255 if "ignored" in name else -100)).all() for part in parts):
            continue  # no loss of its own, which is an error of another kind
        try:
            found = Problem(model, parts, loss).loss()
        except UserError as error:
            assert "loss terms" in str(error) and "all labels ignored" in str(error)
            continue
        assert found == pytest.approx(whole, rel=1e-12), sizes


def test_images_with_ignored_pixels_weigh_what_is_left_of_them() -> None:
    model = nn.Conv2d(2, 3, 1).double()
    y = torch.randint(3, (6, 4, 5))
    y[:3, :, 1:] = 255
    batch = (torch.randn(6, 2, 4, 5, dtype=torch.float64), y)
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    problem = Problem(model, split(batch, 3, 3), supervised_loss(criterion))
    assert problem.num_terms == [12, 60]
    assert problem.loss() == pytest.approx(criterion(model(batch[0]), y).item(), rel=1e-12)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.MSELoss(reduction="none"),
        functools.partial(F.cross_entropy, reduction="sum"),
    ],
)
def test_a_criterion_that_is_no_mean_is_refused(criterion: Any) -> None:
    with pytest.raises(UserError, match=r"reduction='(sum|none)'.*Give it reduction='mean'"):
        supervised_loss(criterion)


# --- labels that a model shifts


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=17, bos_token_id=0, eos_token_id=0, **sizes)).double()


def test_a_causal_language_model_weighs_the_labels_that_it_predicts() -> None:
    tokens = [torch.randint(17, (6, 2)), torch.randint(17, (1, 16))]
    model = gpt2()
    problem = Problem(model, [{"input_ids": each, "labels": each} for each in tokens])
    assert problem.num_terms == [6, 15]
    model.eval().requires_grad_(False)
    each = [F.cross_entropy(model(t).logits[:, :-1].flatten(0, 1), t[:, 1:].flatten(), reduction="sum") for t in tokens]
    assert problem.loss() == pytest.approx(float(sum(each)) / 21, rel=1e-12)


def test_ignored_first_labels_are_not_left_out_twice() -> None:
    tokens = torch.randint(1, 17, (3, 5))
    labels = tokens.clone()
    labels[:, :2] = -100
    labels[0, 2:4] = -100
    assert Problem(gpt2(), [{"input_ids": tokens, "labels": labels}]).num_terms == [7]
    labels[1, 0] = 3  # not ignored, and still nothing that is predicted
    assert Problem(gpt2(), [{"input_ids": tokens, "labels": labels}]).num_terms == [7]


def test_a_loss_of_ones_own_that_shifts_its_targets_is_noticed_too() -> None:
    model = TinyTransformer(lora=False)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0])[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten())

    batches = [(t, t) for t in (torch.randint(6, (6, 2)), torch.randint(6, (1, 5)))]
    assert Problem(model, batches, loss).num_terms == [6, 4]
    assert Problem(model, batches, lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten())).num_terms == [
        12,
        5,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_bits_do_not_hide_a_first_label_that_is_predicted(dtype: torch.dtype) -> None:
    from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForTokenClassification

    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 8))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2}
    bert = BertConfig(vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    torch.manual_seed(1)
    for model in (
        BartForConditionalGeneration(BartConfig(vocab_size=31, d_model=8, **sizes, **heads)),
        BertForTokenClassification(bert),
    ):
        tokens = [torch.randint(3, 31, shape) for shape in ((6, 4), (1, 9))]
        batches = [{"input_ids": t, "labels": t % model.config.num_labels} for t in tokens]
        assert Problem(model.to(dtype), batches).num_terms == [24, 9]
    assert Problem(gpt2().to(dtype), [{"input_ids": t % 17, "labels": t % 17} for t in tokens]).num_terms == [18, 8]


def test_labels_of_ones_own_that_begin_at_one_are_counted() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten() - 1)

    model, inputs = nn.Linear(4, 3).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    labels = 1 + torch.arange(15).reshape(3, 5) % 3
    assert Problem(model, [(inputs, labels)], loss).num_terms == [15]


# --- what the guard notices


def masked(model: nn.Module, batch: Any) -> Tensor:
    """Divides by what it does not leave out, and leaves out class 0."""
    keep = (batch[1] > 0).double()
    return (F.cross_entropy(model(batch[0]), batch[1], reduction="none") * keep).sum() / keep.sum()


def by_class(model: nn.Module, batch: Any) -> Tensor:
    """Outer classes weigh alike, so that the two ends of the classes alone do not show it."""
    return F.cross_entropy(model(batch[0]), batch[1], weight=torch.tensor([1.0, 9.0, 1.0], dtype=torch.float64))


SORTED = [(torch.randn(4, 4, dtype=torch.float64), torch.full((4,), c)) for c in (0, 1, 2)]


@pytest.mark.parametrize(
    ("loss", "batches"),
    [
        (masked, rows(10)),
        (by_class, rows(6, 5)),
        (by_class, SORTED),  # within a batch all examples weigh the same
        (by_class, rows(*[1] * 8)),  # no batch can be cut
        (lambda m, b: token_loss(m, b) if isinstance(b, dict) else None, None),
    ],
)
def test_a_loss_that_divides_by_something_else_is_refused_without_being_told(loss: Any, batches: Any) -> None:
    options: dict[str, Any] = {}
    model: nn.Module = mlp()
    if batches is None:  # examples are counted, the loss divides by tokens
        model, batches, options = TinyTransformer(lora=False), token_batches(5), {"terms": lambda b: len(b["labels"])}
    with pytest.raises(UserError, match=r"divides by something else.*Pass terms="):
        Problem(model, batches, loss, **options)


def test_right_terms_are_accepted_and_checked() -> None:
    weight = torch.tensor([1.0, 9.0, 1.0], dtype=torch.float64)
    batches = rows(6, 5)
    problem = Problem(mlp(), batches, by_class, terms=lambda b: float(weight[b[1]].sum()))
    whole = by_class(mlp().eval(), tuple(map(torch.cat, zip(*batches, strict=True))))
    assert problem.loss() == pytest.approx(whole.item(), rel=1e-12)
    assert problem.subset([1]).num_terms == problem.num_terms[1:]
    same = Problem(mlp(), batches, WeightedLoss(by_class, lambda b: float(weight[b[1]].sum())))
    assert same.with_scope("model").num_terms == problem.num_terms


def test_a_sum_is_refused() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    with pytest.raises(UserError, match="the loss is a sum.*Return the mean"):
        Problem(mlp(), rows(6), loss)


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0]) @ model(batch[0]).T
    return F.cross_entropy(logits, torch.arange(len(logits)))


def test_a_contrastive_loss_needs_to_be_told_what_batches_weigh() -> None:
    with pytest.raises(UserError, match="is no mean over examples.*act on each other.*pass terms="):
        Problem(mlp(), rows(6, 5), contrastive)
    assert Problem(mlp(), rows(6, 5), contrastive, terms=count_terms).num_terms == [6, 5]


class TimeFirst(nn.Module):
    """A recurrent language model whose batches are (time, sequences), as torch's own are by default."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell, self.head = nn.Embedding(7, 6), nn.LSTM(6, 6), nn.Linear(6, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.cell(self.embedding(tokens))[0])
        return logits.flatten(0, 1)


@pytest.mark.parametrize("seed", range(5))
def test_sequences_in_the_second_dimension_need_no_more_than_terms(seed: int) -> None:
    torch.manual_seed(seed)
    model, tokens = TimeFirst().double(), [torch.randint(7, (12, n)) for n in (6, 2)]
    batches = [(each, each.roll(-1, 0)) for each in tokens]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1].flatten())

    with pytest.raises(UserError, match="the first dimension counts something else.*pass terms="):
        Problem(model, batches, loss)
    assert Problem(model, batches, loss, terms=count_terms).num_terms == [72, 24]


def test_only_a_weighted_loss_is_asked_for_its_terms() -> None:
    class Sum:
        terms = ("cross-entropy", "penalty")

        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1]) + sum(p.pow(2).sum() for p in model.parameters())

    assert Problem(mlp(), rows(6, 5), Sum()).num_terms == [6, 5]


def test_a_criterion_of_ones_own_may_call_its_mean_as_it_likes() -> None:
    class Focal(nn.Module):
        reduction = "elementwise_mean"

        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            each = F.cross_entropy(logits, targets, reduction="none")
            return ((1 - torch.exp(-each)) ** 2 * each).mean()

    assert Problem(mlp(), rows(6, 5), supervised_loss(Focal())).num_terms == [6, 5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_no_reason_to_refuse(dtype: torch.dtype) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 9)).to(dtype)
        batches = [(torch.randn(n, 64, dtype=dtype), torch.randint(9, (n,))) for n in (33, 7)]
        Problem(model, batches, supervised_loss(F.cross_entropy))


def test_a_penalty_that_every_batch_has_is_no_reason_to_refuse() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) + sum(p.pow(2).sum() for p in model.parameters())

    Problem(mlp(), rows(5, 4), loss)


def test_what_cannot_be_put_together_anew_is_not_checked() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return torch.stack([model(x).pow(2).mean() for x in batch["inputs"]]).mean()

    batches = [{"inputs": [torch.randn(k, 4, dtype=torch.float64) for k in (2, 5)], "labels": torch.zeros(3)}]
    assert uneven_parts(batches) is None
    Problem(mlp(), batches, loss)

    def fixed(model: nn.Module, batch: Any) -> Tensor:
        if len(batch[1]) != 5:
            raise ValueError("always five")
        return F.cross_entropy(model(batch[0]), batch[1])

    Problem(mlp(), rows(5, 5), fixed)


def test_the_checks_take_no_more_than_two_passes_and_three_batches() -> None:
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(len(batch[1]))
        return F.cross_entropy(model(batch[0]), batch[1])

    Problem(mlp(), rows(*[6] * 20), loss)
    assert sum(seen) <= 2 * 120 + 3 * 6


# --- the upstreams' own


class Letters:
    """Enough of a tokenizer for the collator: a token per letter, its special tokens spelt as one sign each."""

    bos_token, eos_token, padding_side = "<", ">", "right"

    def _ids(self, text: str) -> list[int]:
        return [1, *(2 + ord(letter) % 15 for letter in text)]  # begins with a token of its own, as LLaMA's does

    def __call__(self, texts: Any, padding: Any = False, **_: Any) -> Any:
        if isinstance(texts, str):
            return {"input_ids": self._ids(texts)}
        ids = [self._ids(text) for text in texts]
        longest = max(map(len, ids))
        left = self.padding_side == "left"
        padded, mask = [], []
        for each in ids:
            gap = [0] * (longest - len(each))
            padded.append([*gap, *each] if left else [*each, *gap])
            mask.append([*gap, *[1] * len(each)] if left else [*[1] * len(each), *gap])
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}

    def as_target_tokenizer(self) -> Any:
        import contextlib

        return contextlib.nullcontext()


TEXTS = [("a b", "yes"), ("what is this about", "no"), ("c", "certainly not"), ("some words", "y"), ("dd", "maybe")]


def collated(repo: Path, model: nn.Module, name: str, sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Batches of these sizes by upstream's own collator."""
    module = import_file(repo / "src" / "uie_collator.py", f"collator_of_{repo.name.replace('-', '_')}")
    model.config._name_or_path = name
    collator = module.DataCollatorForUIE(Letters(), model=model, max_source_length=64, max_target_length=32)
    examples = [
        {"Task": "t", "Dataset": "d", "Samples": [], "subset": "train"}
        | {"Instance": {"instruction": "say {0} ", "sentence": sentence, "label": label}}
        for sentence, label in TEXTS
    ]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [dict(collator(examples[a : a + size])) for a, size in zip(starts, sizes, strict=True)]


def trainer_of(label_smoother: Any = None) -> Any:
    """What ``trainer_loss`` needs of a Trainer."""

    def compute_loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        labels = inputs.pop("labels") if label_smoother else None
        outputs = model(**inputs)
        return label_smoother(outputs, labels) if label_smoother else outputs.loss

    return SimpleNamespace(compute_loss=compute_loss, label_smoother=label_smoother)


SPLITS = ((5,), (2, 3), (1, 4), (1, 1, 1, 1, 1), (4, 1))


@pytest.mark.third_party
@pytest.mark.parametrize("repo", ["N-LoRA", "O-LoRA"])
def test_llama_of_an_upstream_is_weighed_by_the_mask_that_it_divides_by(
    repo: str, upstream: Callable[[str], Path]
) -> None:
    from transformers import LlamaConfig

    module = import_file(upstream(repo) / "src" / "model" / "llama.py", f"llama_of_{repo.replace('-', '_')}")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = module.LlamaForCausalLM_with_lossmask(LlamaConfig(vocab_size=17, **sizes))  # float64 is NaN there
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that the examples' losses differ
    values = []
    for split_sizes in SPLITS:
        batches = collated(upstream(repo), model, "tiny-llama", split_sizes)
        problem = Problem(model, batches, trainer_loss(trainer_of()))
        assert problem.num_terms == [float(batch["loss_mask"].sum()) for batch in batches]
        values.append(problem.loss())
    assert values == pytest.approx([values[0]] * len(values), rel=1e-5)


@pytest.mark.third_party
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("repo", ["N-LoRA", "O-LoRA"])
def test_t5_of_an_upstream_is_weighed_by_the_labels_that_it_predicts(
    repo: str, smoothing: float, upstream: Callable[[str], Path]
) -> None:
    from transformers import T5Config, T5ForConditionalGeneration
    from transformers.trainer_pt_utils import LabelSmoother

    config = T5Config(vocab_size=17, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).double()
    trainer = trainer_of(LabelSmoother(epsilon=smoothing) if smoothing else None)
    values = []
    for split_sizes in SPLITS:
        batches = collated(upstream(repo), model, "tiny-t5", split_sizes)
        problem = Problem(model, batches, trainer_loss(trainer))
        assert problem.num_terms == [int((batch["labels"] != -100).sum()) for batch in batches]
        values.append(problem.loss())
    assert values == pytest.approx([values[0]] * len(values), rel=1e-6)


class MaskedTokens(nn.Module):
    """Divides by the sum of a mask one place longer than what it is applied to; not a line of upstream's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyTransformer(lora=False)

    def forward(self, input_ids: Tensor, labels: Tensor, loss_mask: Tensor) -> Any:
        each = F.cross_entropy(self.inner(input_ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return SimpleNamespace(loss=(each * loss_mask[:, :-1].flatten()).sum() / loss_mask.sum())


def test_a_trainers_loss_with_a_mask_is_weighed_by_it() -> None:
    tokens = torch.randint(6, (5, 5))
    mask = torch.tril(torch.ones(5, 5), diagonal=1).flip(1)
    batch = {"input_ids": tokens, "labels": tokens, "loss_mask": mask}
    model = MaskedTokens()
    found = [Problem(model, split(batch, *s), trainer_loss(trainer_of())).loss() for s in SPLITS]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-12)
    with pytest.raises(UserError, match="divides by something else"):
        Problem(model, [batch], model_loss)


def test_the_image_loops_loss_does_not_depend_on_how_the_examples_are_batched() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    batch = rows(5)[0]
    found = [Problem(Network(), split(batch, *s), lambda m, b: classification_loss(m, *b)).loss() for s in SPLITS]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-12)
