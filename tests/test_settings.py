"""Settings as key=value words: what is accepted, and what a mistake is told."""

from __future__ import annotations

import dataclasses

import pytest

from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.runner.resolve import parse
from flatpatch.runner.sweep import expand
from flatpatch.settings import (
    CHOICES,
    OF_SAM_NAMED,
    Settings,
    describe,
    in_name,
    options_of,
    read_words,
    sam_title,
    split_word,
)
from flatpatch.upstreams import UPSTREAMS


def message(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(words)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_are_taken_where_nothing_is_said() -> None:
    request = parse([])
    assert request.settings == Settings(method="nlora")
    assert set(request.sources.values()) == {"default"}


def test_integer_is_accepted_for_a_float() -> None:
    assert parse(["rho=1"]).settings.rho == 1.0


def test_value_may_contain_an_equals_sign() -> None:
    assert split_word("name=a=b") == ("name", "a=b")
    assert parse(["upstream.run_name=a=b"]).overrides == {"run_name": "a=b"}


def test_text_is_taken_as_it_is() -> None:
    assert parse(["output=${oc.env:HOME}", "run=???"]).settings.output == "${oc.env:HOME}"


def test_later_word_wins() -> None:
    assert parse(["sam=sam", "sam=off"]).settings.sam == "off"


def test_record_says_where_each_value_came_from() -> None:
    record = parse(["rho=0.1", "upstream.lamda_1=0.2"]).as_record()
    assert record["rho"] == {"value": 0.1, "source": "command line"}
    assert record["seed"] == {"value": 42, "source": "default"}
    assert record["upstream.lamda_1"] == {"value": "0.2", "source": "command line"}


def test_unknown_setting_is_told_the_nearest_one() -> None:
    assert "unknown setting 'sed'. Did you mean 'seed'?" in message("sed=3")


def test_stray_flag_is_told_the_form_to_use() -> None:
    assert "key=value: rho=0.1" in message("--rho=0.1")
    assert "'--dryrun' is no option. Did you mean '--dry-run'?" in message("--dryrun")
    assert "'--quite' is no option. Did you mean '--quiet'?" in message("--quite")
    assert "key=value, e.g. rho=0.05" in message("rho")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("rho=-1", "rho=-1 is out of range (expected a finite number >= 0"),
        ("rho=abc", "rho='abc' is not a number (expected e.g. rho=0.05)"),
        ("rho=nan", "rho=nan is out of range"),
        ("rho=inf", "rho=inf is out of range"),
        ("rho=0,0.1", "use: python -m flatpatch sweep"),
        ("seed=1.5", "seed='1.5' is not a whole number"),
        ("seed=-1", "seed=-1 is out of range"),
        ("budget=0", "budget=0 is out of range (expected a whole number from 1 to 1000, e.g. budget=2)"),
        ("budget=-1", "budget=-1 is out of range"),
        ("budget=1.5", "budget='1.5' is not a whole number"),
        ("seed=99999999999", "from 0 to 4294967295"),
        ("port=99999", "from 0 to 65535"),
        ("rho=${seed}", "is not a number"),
        ("seed=???", "is not a whole number"),
        ("method=nlor", "unknown method 'nlor'. Did you mean 'nlora'? Expected: nlora, olora"),
        ("order=9", "unknown order '9' for method nlora. Expected: 1, 2, 3, 4, 5, 6, llama1"),
        ("profile=fast", "unknown profile 'fast'. Expected: auto, upstream, paper, record, quick, small"),
        ("run=a/b", "is not a plain name; choose the place with output=FOLDER"),
        ("run=my-Adapter", "has 'adapter' in its path"),
        ("output=llama-runs", "has 'llama' in its path"),
        ("output=", "output= is empty"),
        ("output=  ", "output= is empty"),
        ("output=~nobody-of-that-name/x", "there is no home folder of that user here"),
        ("data=~nobody-of-that-name", "there is no home folder of that user here"),
        ("model=~nobody-of-that-name", "there is no home folder of that user here"),
        ("run=..", "is not a plain name"),
        ("run=/etc", "is not a plain name"),
        ("run=-x", "begins with '-'"),
        ("run=a,b", "has a comma"),
        ("rho=1_0", "rho='1_0' is not a number"),
        ("tasks=amazon,", "has an empty name"),
        ("tasks=amazon,amazon", "names amazon twice"),
        ("tasks=amazon, agnews,amazon", "names amazon twice"),
        ("device=0,0", "names 0 twice"),
        ("measure=loss,trace,loss", "names loss twice"),
        ("measure_scope=adapter,adapter", "names adapter twice"),
        ("measure_when=after,after", "names after twice"),
    ],
)
def test_bad_value_is_told_what_was_expected(word: str, expected: str) -> None:
    assert expected in message(word)


def test_olora_without_a_script_for_an_order_says_so() -> None:
    assert "O-LoRA ships no script for orders 4 and 5" in message("method=olora", "order=4")


def test_all_mistakes_are_told_at_once() -> None:
    text = message("rho=abc", "sed=3", "profile=fast")
    assert text.startswith("3 problems, nothing was started:")
    assert all(part in text for part in ("rho='abc'", "'sed'", "'fast'"))


def test_words_of_a_verb_are_read_with_every_mistake_at_once() -> None:
    known = ("run", "page", "margin")
    assert read_words("report", ["run= a,b ", "page=x=y"], known) == ({"run": "a,b", "page": "x=y"}, [])
    given, problems = read_words("report", ["run=a", "run=b", "margin= ", "pge=x", "here"], known)
    assert given == {"run": "a", "margin": ""}
    assert problems == [
        "run= is given twice. Several values have commas between them: run=A,B.",
        "margin= is empty. See report --help.",
        "unknown setting 'pge' of report. Did you mean 'page'? Known settings: run, page, margin.",
        "'here' is not a setting. Settings are written key=value, e.g. run=VALUE. See --help.",
    ]


@pytest.mark.parametrize("verb", ["compare", "report", "measure", "patches verify"])
def test_every_verb_tells_all_mistakes_in_its_words(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    key = "repo" if verb.startswith("patches") else "run"
    assert main([*verb.split(), f"{key}=a", f"{key}=b", f"{key[:-1]}=c", "here"]) == 2
    told = capsys.readouterr().err
    assert f"{key}= is given twice" in told
    assert f"unknown setting '{key[:-1]}' of {verb}. Did you mean '{key}'?" in told
    assert "'here' is not a setting" in told


def test_help_names_every_setting_and_its_choices() -> None:
    text = describe(list(UPSTREAMS))
    for name in Settings.__dataclass_fields__:
        assert f"  {name}=" in text
    assert "|".join(CHOICES["scope"]) in text
    assert all(line[20] == " " != line[21] for line in text.splitlines() if len(line) > 30)  # the texts stand apart


def test_sweep_takes_every_combination_of_lists_and_ranges() -> None:
    assert expand(["sam=off,sam", "seed=0..2"]) == [
        [f"sam={kind}", f"seed={seed}"] for kind in ("off", "sam") for seed in (0, 1, 2)
    ]


def test_sweep_leaves_names_of_places_whole() -> None:
    assert expand(["device=0,1", "upstream.x=a,b", "tasks=amazon,agnews"]) == [
        ["device=0,1", "upstream.x=a,b", "tasks=amazon,agnews"]
    ]


@pytest.mark.parametrize("word", ["seed=1,1", "seed=0..1000000000", "seed=0..10000"])
def test_sweep_refuses_a_list_that_cannot_be_meant(word: str) -> None:
    """A range of a thousand million took all memory before anything was said."""
    with pytest.raises(UserError, match="names 1 twice|these are 1000+1 runs. A sweep has at most 10000"):
        expand([word])


def test_sweep_of_many_runs_needs_a_word_more() -> None:
    with pytest.raises(UserError, match=r"these are 1100 runs, 100 values of seed alone. If you mean it, add yes=true"):
        expand(["seed=0..99", "rho=0..10"])
    assert len(expand(["seed=0..99", "rho=0..10"], sure=True)) == 1100
    assert len(expand(["seed=0..199"])) == 200
    with pytest.raises(UserError, match="these are 201 runs"):
        expand(["seed=0..200"])


def test_sweep_refuses_an_empty_range() -> None:
    with pytest.raises(UserError, match=r"the range is empty .* seed=1\.\.3"):
        expand(["seed=3..1"])


@pytest.mark.parametrize("words", [("method=inflora", "scope=A"), ("method=cllora", "scope=B")])
def test_scope_without_a_trained_weight_is_refused(words: tuple[str, str]) -> None:
    assert f"{words[1]} has nothing to perturb" in message(*words, "sam=sam")


def test_frozen_factor_of_cllora_is_perturbed_in_the_task_step_alone() -> None:
    assert parse(["method=cllora", "sam=sam", "scope=B", "sam_on=task"]).settings.scope == "B"
    assert "has nothing to perturb" in message("method=cllora", "sam=sam", "scope=B", "sam_on=distillation")


@pytest.mark.parametrize("method", ["nlora", "olora", "seqlora", "inclora"])
def test_head_of_a_method_that_trains_none_is_refused(method: str) -> None:
    assert "scope=head has nothing to perturb" in message(f"method={method}", "sam=sam", "scope=head")
    assert parse([f"method={method}", "sam=off", "scope=head"]).settings.scope == "head", "without SAM no effect"


def test_penalty_that_a_method_lacks_cannot_be_left_out_of_the_ascent() -> None:
    assert parse(["method=nlora", "sam=sam", "ascent_loss=task"]).settings.ascent_loss == "task"
    for method in ("seqlora", "inclora"):
        assert "ascent_loss=task has no penalty" in message(f"method={method}", "sam=sam", "ascent_loss=task")


def test_random_directions_have_no_use_for_what_shapes_the_ascent() -> None:
    notes = parse(["sam=random", "eta=0.1", "ascent_loss=task"]).notes
    assert notes == (
        "ascent_loss=task has no effect: sam=random does not use it. Leave it out.",
        "eta=0.1 has no effect: sam=random does not use it, sam=asam does. Leave it out.",
    )
    assert parse(["sam=random", "rho=0.1", "scope=A", "sync=global"]).notes == ()


def test_effective_radius_and_balancing_need_factors_and_say_where_they_change_nothing() -> None:
    assert parse(["method=nlora", "sam=sam", "sam_radius=effective"]).notes == ()
    assert parse(["sam=asam", "sam_radius=effective", "rho=0.5"]).notes == (
        "sam_radius=effective has no effect: sam=asam does not use it. Leave it out.",
    )
    assert parse(["sam=nbar", "sync=global", "sam_radius=effective", "rho=1"]).notes == (
        "sam_radius=effective has no effect: sam=nbar does not use it. Leave it out.",
        "sync=global has no effect: sam=nbar does not use it. Leave it out.",
    )
    assert parse(["method=nlora", "sam=bilora", "sync=global", "scope=A", "bilora_lr=0.1"]).notes == (
        "scope=A has no effect: sam=bilora does not use it. Leave it out.",
    )
    assert "unknown sam_radius 'merged'" in message("sam=sam", "sam_radius=merged")
    without = ("method=seqlora", "tuning=full", "profile=small")
    assert "sam_radius=effective has nothing to go by: tuning=full" in message(
        *without, "sam=sam", "sam_radius=effective"
    )
    assert "sam=obar has nothing to go by: tuning=full" in message(*without, "sam=obar")
    assert "scope=B has nothing for sam=nbar" in message("sam=nbar", "scope=B")
    assert "boundless while B is near zero" in message("sam=sam", "sam_radius=effective", "scope=A")
    assert "moves no LoRA" in message("sam=gsam", "sam_radius=effective", "scope=head")
    assert parse(["sam=asam", "sam_radius=effective", "scope=A"]).settings.scope == "A"
    for words in (["sam=nbar"], ["sam=flatlora"], ["sam=bilora"], ["sam=sam", "sam_radius=effective"]):
        assert "have no partner" in message("method=duallora", *words)
    for method in ("cllora", "sdlora"):
        for kind in ("flatlora", "bilora"):
            assert "scaled by what is learned" in message(f"method={method}", f"sam={kind}")
        assert parse([f"method={method}", "sam=sam", "sam_radius=effective"]).notes == ()
    for method in ("inflora", "inflora_clip"):
        assert "trains B alone" in message(f"method={method}", "sam=nbar")
    assert parse(["method=seqlora_clip", "sam=nbar"]).settings.sam == "nbar"


def test_a_kind_of_measurement_has_its_own_settings() -> None:
    own = ["measure_ledger_every=2", "measure_live_every=2", "measure_live_samples=4"]
    assert parse(["measure=ledger,live", *own]).notes == ()
    assert parse(["measure=trace", *own]).notes == (
        "measure_ledger_every=2 has no effect: no ledger is kept. Add measure=ledger.",
        "measure_live_every=2 has no effect: no training is followed. Add measure=live.",
        "measure_live_samples=4 has no effect: no training is followed. Add measure=live.",
    )


def test_a_kind_of_sam_has_the_settings_that_it_uses_and_no_others() -> None:
    assert parse(["sam=fsam", "fsam_sigma=0.5", "ascent_loss=task", "ascent_batch=0.25"]).notes == ()
    assert parse(["sam=gsam", "fsam_sigma=0.5", "ascent_batch=0.25", "ascent_loss=task"]).notes == (
        "ascent_batch=0.25 has no effect: sam=gsam does not use it. Leave it out.",
        "ascent_loss=task has no effect: sam=gsam does not use it. Leave it out.",
        "fsam_sigma=0.5 has no effect: sam=gsam does not use it, sam=fsam does. Leave it out.",
    )
    given = parse(["sam=looksam", "looksam_k=2", "gsam_alpha=0.1"]).settings
    assert options_of(given) == {"looksam_k": 2, "looksam_alpha": 0.7}
    assert in_name(given, OF_SAM_NAMED) == {"looksam_k": 2}
    assert options_of(parse(["sam=off", "looksam_k=2"]).settings) == {}


@pytest.mark.parametrize(
    "word",
    [
        "looksam_k=0",
        "fsam_lambda=1",
        "fsam_lambda=-0.1",
        "ascent_batch=0",
        "ascent_batch=1.5",
        "cflat_lambda=-1",
        "bilora_rank=0",
        "bilora_lr=-1",
    ],
)
def test_settings_of_the_kinds_have_their_ranges(word: str) -> None:
    assert f"{word} is out of range (expected " in message("sam=sam", word)


def test_scopes_follow_what_is_trained() -> None:
    for method, tuning in (("seqlora", "full"), ("seqlora_vit", "head"), ("seqlora_vit", "full")):
        settings = parse([f"method={method}", f"tuning={tuning}", "sam=sam", "measure=loss"]).settings
        assert (settings.scope, settings.measure_scope) == ("all", "trainable")
    asked = parse(["method=seqlora_vit", "tuning=full", "sam=sam", "scope=head", "measure_scope=model"]).settings
    assert (asked.scope, asked.measure_scope) == ("head", "model")
    # Without SAM the scope has no effect, as ever.
    assert parse(["method=seqlora_vit", "tuning=full", "scope=lora"]).notes[0].startswith("scope=lora has no effect")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "method=nlora tuning=full",
            "tuning=full: N-LoRA is trained with lora alone. Methods that have it: seqlora, seqlora_vit.",
        ),
        (
            "method=seqlora tuning=head",
            "tuning=head: sequential LoRA is trained with lora, full alone. Methods that have it: seqlora_vit.",
        ),
        ("method=seqlora tuning=ful", "unknown tuning 'ful'. Did you mean 'full'? Expected: lora, head, full."),
        (
            "method=seqlora tuning=full sam=sam scope=lora",
            "scope=lora has nothing to perturb: tuning=full trains no LoRA. Use scope=all.",
        ),
        (
            "method=seqlora_vit tuning=head measure=loss measure_scope=adapter,merged,tangent,model",
            "measure_scope=adapter,merged,tangent has nothing to measure: tuning=head trains no LoRA. Use "
            "measure_scope=trainable or model.",
        ),
        ("fraction=0", "fraction=0 is out of range (expected a share over 0 and at most 1, e.g. fraction=0.1)."),
        ("fraction=1.5", "fraction=1.5 is out of range"),
        ("fraction=nan", "fraction=nan is out of range"),
    ],
)
def test_tuning_or_share_that_cannot_be_is_one_message(words: str, expected: str) -> None:
    text = message(*words.split())
    assert expected in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ("sam=sam", "SAM rho=0.05 scope=lora"),
        ("sam=sam sam_radius=effective", "SAM rho=0.05 scope=lora sam_radius=effective"),
        ("sam=gsam gsam_alpha=0.2 fsam_sigma=2", "GSAM rho=0.05 scope=lora gsam_alpha=0.2"),
        ("sam=sam ascent_batch=0.25 ascent_loss=task", "SAM rho=0.05 scope=lora ascent_loss=task ascent_batch=0.25"),
        ("sam=flatlora scope=all sync=global", "Flat-LoRA rho=0.05"),
        ("sam=nbar rho=1", "nBAR rho=1"),
        ("sam=off rho=0.1 scope=A", "SAM off"),
    ],
)
def test_sam_is_called_by_all_that_makes_it_what_it_is_and_by_nothing_without_effect(words: str, title: str) -> None:
    values = dataclasses.asdict(parse(words.split()).settings)
    assert sam_title(values, told=("scope",)) == title
    assert sam_title(values) == title.replace(" scope=lora", "")


@pytest.mark.parametrize(("sam", "papers"), [("nbar", "0.5, 1, 2"), ("obar", "0.5, 1, 2"), ("asam", "0.5")])
def test_a_radius_on_another_scale_than_sams_must_be_named_or_is_noted(sam: str, papers: str) -> None:
    (note,) = parse([f"sam={sam}"]).notes
    assert note == (
        f"rho=0.05 is SAM's default, and rho of sam={sam} is on another scale: its paper takes {papers}. Name rho."
    )
    assert parse([f"sam={sam}", "rho=0.05"]).notes == ()
    assert parse(["sam=sam"]).notes == parse(["sam=flatlora"]).notes == ()
