"""What ``upstream.<argument>=`` may say: refused before anything starts, or it reaches the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.families.text import overrides
from flatpatch.families.text.overrides import Kind, Range, problems_of, read
from flatpatch.families.text.reference import ReferenceTask
from flatpatch.families.text.reference.__main__ import read_task
from flatpatch.families.text.upstream import TextUpstream
from flatpatch.runner.resolve import make_plan, parse
from flatpatch.upstreams import UPSTREAMS


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        make_plan(parse(["profile=quick", "device=cpu", *words]), dry_run=True)
    assert caught.value.exit_code == 2
    return str(caught.value)


TEXT = [
    ("num_train_epochs=-1", "out of range (expected over 0 and at most 1000000)"),
    ("num_train_epochs=0", "out of range (expected over 0 and at most 1000000)"),
    ("num_train_epochs=abc", "(expected over 0 and at most 1000000)"),
    ("num_train_epochs=", "(expected over 0 and at most 1000000)"),
    ("num_train_epochs=nan", "over 0 and at most 1000000)"),
    ("per_device_train_batch_size=0", "out of range (expected at least 1 and at most 2147483647)"),
    ("per_device_eval_batch_size=-4", "out of range (expected at least 1 and at most 2147483647)"),
    ("gradient_accumulation_steps=1.5", "is not a whole number (expected at least 1 and at most 2147483647)"),
    ("learning_rate=-1", "out of range (expected at least 0)"),
    ("learning_rate=nan", "out of range (expected a finite number, at least 0)"),
    ("learning_rate=inf", "out of range (expected a finite number, at least 0)"),
    ("max_grad_norm=-1", "out of range (expected at least 0)"),
    ("max_source_length=0", "out of range (expected at least 1 and at most 2147483647)"),
    ("lamda_1=-0.5", "out of range (expected at least 0)"),
    ("num_train_epochs=99999999999", "out of range (expected over 0 and at most 1000000)"),
    ("learning_rate=1_0", "is not a number (expected at least 0)"),
    (f"max_target_length={'9' * 400}", "out of range (expected at least 1 and at most 2147483647)"),
    ("max_train_samples=0", "out of range (expected at least 1 and at most 2147483647)"),
]


@pytest.mark.parametrize(("word", "expected"), TEXT)
def test_value_that_the_reference_engine_cannot_use_is_refused(word: str, expected: str) -> None:
    text = refusal("method=nlora", "engine=reference", f"upstream.{word}")
    assert text.startswith(f"upstream.{word.split('=')[0]}=")
    assert expected in text


@pytest.mark.third_party
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *TEXT,
        ("warmup_ratio=2", "out of range (expected at least 0 and at most 1)"),
        ("adam_beta2=1", "out of range (expected at least 0 and under 1)"),
        ("lr_scheduler_type=constnt", "Did you mean 'constant'? Expected: linear, cosine"),
        ("evaluation_strategy=sometimes", "Expected: no, steps, epoch."),
        ("add_task_name=maybe", "is neither true nor false"),
        ("do_train=false", "would end without a result"),
        ("predict_with_generate=0", "would end without a result"),
        ("instruction_file=", "upstream.instruction_file='' is empty"),
        ("run_name=--do_eval", "begins with '-'"),
        ("logging_steps=0", "out of range (expected at least 1 and at most 2147483647)"),
        ("_n_gpu=2", "upstream has no argument '_n_gpu'"),
        ("instruction_strategy=double", "Expected: single, multiple."),
        ("do_demo=true", "cannot reach the run: N-LoRA never uses it"),
        ("lamda_2=1", "cannot reach the run: N-LoRA never uses it"),
        ("fp16=true", "transformers refuses it: FP16"),
        ("load_best_model_at_end=true", "transformers refuses it: --load_best_model_at_end requires"),
    ],
)
def test_value_that_upstreams_parser_cannot_use_is_refused(
    word: str, expected: str, upstream: Callable[[str], Path]
) -> None:
    known = overrides.upstream_kinds(upstream("N-LoRA") / "src" / "run_N_lora.py")
    name, value = word.split("=", 1)
    unused = UPSTREAMS["nlora"].unused
    problems = problems_of({name: value}, known, unused=unused, title="N-LoRA", reference=False, device="cpu")
    assert expected in " ".join(problems)


@pytest.mark.third_party
def test_values_that_upstreams_parser_takes_are_taken(upstream: Callable[[str], Path]) -> None:
    upstream("N-LoRA")
    words = ["num_train_epochs=0.5", "max_steps=5", "add_task_name=No", "lr_scheduler_type=linear", "bf16=false"]
    plan = make_plan(
        parse(["method=nlora", "profile=quick", "device=cpu", *(f"upstream.{word}" for word in words)]), dry_run=True
    )
    command = plan.stages[0].command
    assert command[command.index("--num_train_epochs") + 1] == "0.5"


@pytest.mark.third_party
@pytest.mark.parametrize(("repo", "entry"), [("N-LoRA", "run_N_lora.py"), ("O-LoRA", "run_uie_lora.py")])
def test_kinds_are_those_of_upstreams_own_fields(repo: str, entry: str, upstream: Callable[[str], Path]) -> None:
    kinds = overrides.upstream_kinds(upstream(repo) / "src" / entry)
    assert kinds["lamda_1"] == Kind(float)
    assert kinds["max_source_length"] == Kind(int)
    assert kinds["overwrite_cache"] == kinds["add_task_name"] == Kind(bool)
    assert kinds["instruction_strategy"] == kinds["report_to"] == Kind(str)
    assert kinds["warmup_steps"] == Kind(int)
    assert kinds["learning_rate"] == kinds["num_train_epochs"] == Kind(float)
    assert kinds["evaluation_strategy"].words == ("no", "steps", "epoch")


@pytest.mark.third_party
@pytest.mark.parametrize("row", [row for row in UPSTREAMS.values() if isinstance(row, TextUpstream) and row.repository])
def test_arguments_said_to_be_unused_are_read_nowhere(row: TextUpstream, upstream: Callable[[str], Path]) -> None:
    source = upstream(str(row.repository)) / "src"
    code = "".join(path.read_text(encoding="utf-8") for path in sorted(source.glob("*.py")))
    assert row.unused
    for name in row.unused:
        assert f"{name}:" in code and f"args.{name}" not in code and f"config.{name}" not in code, name


@pytest.mark.parametrize("method", ["seqlora", "inclora"])
def test_penalty_of_a_method_without_one_is_refused(method: str) -> None:
    assert "cannot reach the run" in refusal(f"method={method}", "upstream.lamda_1=1")


def test_argument_that_the_reference_engine_lacks_is_refused_by_its_name() -> None:
    text = refusal("method=nlora", "engine=reference", "upstream.warmup_steps=3")
    assert "upstream.warmup_steps: the reference engine has no argument 'warmup_steps'" in text


def test_every_argument_that_the_reference_engine_takes_reaches_its_task(tmp_path: Path) -> None:
    """One that is let through and dropped would be recorded as if it had had an effect."""
    (tmp_path / "train_tasks.json").write_text('{"TC": [{"dataset name": "agnews"}]}')
    (tmp_path / "test_tasks.json").write_text('{"TC": [{"dataset name": "agnews"}]}')
    places = ("task_config_dir", "model_name_or_path", "base_model", "data_dir", "output_dir")
    known = overrides.reference_kinds()
    assert {"num_train_epochs", "max_train_samples", "max_predict_samples", "lora_r"} <= set(known)
    given = {name: kind.words[-1] if kind.words else "3" for name, kind in known.items()}
    task = read_task({**dict.fromkeys(places, str(tmp_path)), "method": "nlora", **given})
    assert {name: str(getattr(task, name)).removesuffix(".0") for name in known} == given
    assert set(known) <= set(ReferenceTask.__dataclass_fields__)


def test_all_mistakes_are_told_at_once() -> None:
    text = refusal("method=nlora", "engine=reference", "upstream.learning_rate=x", "upstream.seed=1", "upstream.lr=1")
    assert text.startswith("3 problems, nothing was started:")


def test_range_leaves_out_its_open_ends_and_what_is_not_finite() -> None:
    assert [value in Range(0, 1, open="high") for value in (-0.1, 0, 0.5, 1, float("nan"), float("inf"))] == [
        *(False, True, True, False, False, False)
    ]
    assert 0 not in Range(0, open="low") and float("inf") not in Range(0, open="low")


def test_words_mean_what_upstreams_parser_makes_of_them() -> None:
    assert read("x", "Yes", Kind(bool)) is True
    assert read("x", "0", Kind(bool)) is False
    assert read("warmup_steps", "7", Kind(int)) == 7
    assert read("learning_rate", "1e-3", Kind(float)) == 1e-3
    assert read("x", "a=b", Kind()) == "a=b"


def test_nothing_is_asked_of_transformers_for_the_reference_engine_or_a_gpu() -> None:
    known = {"fp16": Kind(bool)}
    for reference, device in ((True, "cpu"), (False, "cuda")):
        assert problems_of({"fp16": "1"}, known, unused=(), title="x", reference=reference, device=device) == []


IMAGES = [
    ("epochs=0", "upstream.epochs=0 is out of range"),
    ("batch_size=-1", "batch_size=-1 is out of range"),
    ("batch_size=100000000000", "batch_size=100000000000 is out of range"),
    ("lrate=-0.1", "lrate=-0.1 is out of range (expected a finite number of at least 0)"),
    ("lrate=NaN", "lrate=NaN is out of range"),
    ("weight_decay=1e999", "weight_decay=Infinity is out of range"),
    ("lamb=1.5", "upstream.lamb=1.5: expected a share over 0 and at most 1"),
    ("lame=0", "lame=0: expected a share over 0 and at most 1"),
    ("rank=1000", "upstream.rank=1000 is more than the model's width (expected at most 64)"),
    ("rank=2.5", "rank=2.5 is out of range"),
    ("optim=lion", 'optim="lion" is unknown here'),
]


@pytest.mark.parametrize(("word", "expected"), IMAGES)
def test_value_that_the_image_reference_cannot_use_is_refused(word: str, expected: str) -> None:
    assert expected in refusal("method=inflora", "engine=reference", f"upstream.{word}")


@pytest.mark.third_party
@pytest.mark.parametrize(
    ("method", "word", "expected"),
    [
        *(("inflora", word, expected) for word, expected in IMAGES),
        ("cllora", "init_lr=-1", "init_lr=-1 is out of range"),
        ("cllora", "min_lr=NaN", "min_lr=NaN is out of range"),
        ("cllora", "msa=[0,0,0]", "msa=[0, 0, 0]: expected three of 0 and 1"),
        ("cllora", "msa=[1,2]", "upstream.msa=[1, 2]: expected three of 0 and 1"),
        ("cllora", "general_pos=[]", "general_pos=[]: expected numbers of blocks from 0 to 5"),
        ("cllora", "specfic_pos=[6]", "specfic_pos=[6]: expected numbers of blocks from 0 to 5"),
        ("cllora", 'general_pos=["a"]', "expected numbers of blocks"),
    ],
)
def test_value_that_the_image_methods_cannot_use_is_refused(
    method: str, word: str, expected: str, upstream: Callable[[str], Path]
) -> None:
    upstream("CL-LoRA" if method == "cllora" else "InfLoRA")
    assert expected in refusal(f"method={method}", "engine=upstream", f"upstream.{word}")


def test_run_with_a_mistaken_override_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It finished with an untrained model once."""
    words = ["method=nlora", "profile=quick", "engine=reference", f"output={tmp_path / 'out'}"]
    assert main(["run", *words, "upstream.num_train_epochs=-1"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("flatpatch: upstream.num_train_epochs='-1' is out of range")
    assert list(tmp_path.iterdir()) == []
