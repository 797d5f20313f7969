"""Reading upstream's shell scripts, and changing their commands with every change written down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flatpatch.errors import FlatpatchError, UserError
from flatpatch.families.text.changes import Editor, dataset_of
from flatpatch.families.text.scripts import Invocation, parse_script
from flatpatch.families.text.upstream import STANDARD_ORDERS, TextUpstream
from flatpatch.upstreams import UPSTREAMS

SCRIPT = """#!/bin/bash
set -x
export CUDA_DEVICE_ORDER="PCI_BUS_ID"
port=$(shuf -i25000-30000 -n1)

# bash scripts/order_1.sh > log 2>&1 &
CUDA_VISIBLE_DEVICES=0,1 deepspeed --master_port $port src/run.py \\
   --do_train \\
   --model_name_or_path initial_model/t5-large \\
   --task_config_dir configs/first \\
   --output_dir out/1-first \\
   --per_device_train_batch_size 8 \\
   --gradient_accumulation_steps 4 \\
   --offset -1 \\
   --run_name 'two words'

sleep 5

CUDA_VISIBLE_DEVICES=0,1 deepspeed --master_port $port src/run.py \\
   --do_train \\
   --model_name_or_path out/1-first/adapter \\
   --task_config_dir configs/second \\
   --output_dir out/2-second \\
   --per_device_train_batch_size 4 \\
   --gradient_accumulation_steps 8
"""


@pytest.fixture
def invocations(tmp_path: Path) -> list[Invocation]:
    (tmp_path / "order.sh").write_text(SCRIPT)
    return parse_script(tmp_path / "order.sh")


def test_script_gives_its_commands_in_order(invocations: list[Invocation]) -> None:
    first, second = invocations
    assert [dataset_of(first), dataset_of(second)] == ["first", "second"]
    assert first.launcher == ("deepspeed", "--master_port", "$port")
    assert first.entry == "src/run.py"
    assert first.world_size == 2
    assert first.words()[:4] == ["src/run.py", "--do_train", "--model_name_or_path", "initial_model/t5-large"]


def test_flags_quotes_and_negative_numbers_keep_their_value(invocations: list[Invocation]) -> None:
    first = invocations[0]
    assert ("do_train", None) in first.arguments
    assert first.get("run_name") == "two words"
    assert first.get("offset") == "-1"


def test_script_without_a_command_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.sh").write_text("echo nothing\n")
    with pytest.raises(FlatpatchError, match="holds no training command"):
        parse_script(tmp_path / "empty.sh")
    with pytest.raises(FlatpatchError, match="cannot be read: No such file"):
        parse_script(tmp_path / "absent.sh")


def test_untouched_commands_have_no_deviation(invocations: list[Invocation]) -> None:
    editor = Editor(invocations)
    editor.set("do_train", None, "already so")
    assert editor.deviations() == []


def test_each_change_is_one_deviation_naming_the_tasks_it_holds_for(invocations: list[Invocation]) -> None:
    editor = Editor(invocations)
    editor.set("per_device_train_batch_size", "8", "because")
    editor.drop("offset", "not needed")
    found = {(d.what, d.upstream, d.here, d.tasks) for d in editor.deviations()}
    assert found == {
        ("--per_device_train_batch_size", "4", "8", ("second",)),
        ("--offset", "-1", None, ("first",)),
    }


def test_world_size_keeps_the_global_batch_by_accumulation_under_deepspeed(invocations: list[Invocation]) -> None:
    editor = Editor(invocations)
    assert editor.fit_world_size(1, "deepspeed", "upstream")
    batches = [
        (int(i.get("per_device_train_batch_size")), int(i.get("gradient_accumulation_steps"))) for i in editor.current
    ]
    assert batches == [(8, 8), (4, 16)]


def test_world_size_keeps_the_accumulation_without_deepspeed(invocations: list[Invocation]) -> None:
    editor = Editor(invocations)
    assert editor.fit_world_size(1, "python", "upstream")
    batches = [
        (int(i.get("per_device_train_batch_size")), int(i.get("gradient_accumulation_steps"))) for i in editor.current
    ]
    assert batches == [(16, 4), (8, 8)]


def test_upstreams_own_world_size_changes_nothing(invocations: list[Invocation]) -> None:
    editor = Editor(invocations)
    assert not editor.fit_world_size(2, "deepspeed", "upstream")
    assert editor.deviations() == []


def test_world_size_that_does_not_divide_the_batch_is_refused(invocations: list[Invocation]) -> None:
    with pytest.raises(UserError, match="a global batch of 64 .* cannot be split over 3"):
        Editor(invocations).fit_world_size(3, "deepspeed", "upstream")


def test_selected_tasks_start_from_the_base_model_and_follow_each_other(invocations: list[Invocation]) -> None:
    editor = Editor(invocations)
    seen = editor.select("second", [(("TC", "first"),), (("TC", "first"), ("SC", "second"))])
    assert [inv.get("model_name_or_path") for inv in editor.current] == ["initial_model/t5-large"]
    assert [inv.get("output_dir") for inv in editor.current] == ["out/1-second"]
    assert seen == [(("SC", "second"),)]


def test_unknown_task_is_told_the_nearest_one(invocations: list[Invocation]) -> None:
    with pytest.raises(UserError, match="unknown task 'secnd'. Did you mean 'second'"):
        Editor(invocations).select("secnd", [(), ()])


@pytest.mark.third_party
@pytest.mark.parametrize("method", ["nlora", "olora"])
def test_real_scripts_parse_for_every_order(method: str, upstream: Callable[[str], Path]) -> None:
    row = UPSTREAMS[method]
    assert isinstance(row, TextUpstream) and row.repository is not None
    checkout = upstream(row.repository)
    for order, script in row.scripts.items():
        found = parse_script(checkout / script)
        tasks = [dataset_of(invocation) for invocation in found]
        assert len(found) == (15 if order in ("4", "5", "6") else 4)
        assert len(set(tasks)) == len(tasks)
        if order in STANDARD_ORDERS:
            assert tuple(tasks) == STANDARD_ORDERS[order]
        for invocation, task in zip(found, tasks, strict=True):
            assert invocation.get("output_dir").endswith(f"-{task}")
            # Every word of the script's text is in what was parsed: nothing is lost, nothing is added.
            text = (checkout / script).read_text()
            assert all(word in text for word in invocation.words())
        total = sum(len(invocation.arguments) for invocation in found)
        body = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        assert total == body.count(" --") - sum(" --master_port" in line for line in body.splitlines())


def test_number_spelled_another_way_is_no_deviation(invocations: list[Invocation]) -> None:
    editor = Editor([invocation.with_argument("learning_rate", "1e-03") for invocation in invocations])
    editor.set("learning_rate", "0.001", "the same")
    assert editor.deviations() == []
    assert editor.current[0].get("learning_rate") == "1e-03"
