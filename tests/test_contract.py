"""The description of a run of an image repository: read as it is written down, and refused with every mistake named."""

from __future__ import annotations

import copy
import json

import pytest

from flatpatch.errors import UserError
from flatpatch.families.vision.places import read_run

GOOD = {
    "schema": 1,
    "task_index": None,
    "task": None,
    "tasks": ["0-4", "5-9"],
    "metrics": "metrics.jsonl",
    "progress": "progress.json",
    "summary": "summary.json",
    "sam": {
        "kind": "sam",
        "rho": 0.05,
        "eta": 0.01,
        "scope": "lora",
        "sync": "local",
        "ascent_loss": "total",
        "seed": 0,
    },
    "adapters": "upstream",
    "vision": {
        "device": "cuda:0,1",
        "data": None,
        "weights": None,
        "workers": 0,
        "model": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4, "mlp_ratio": 4.0},
        "dataset": {"class": "package.module:Class", "seed": 0},
        "sam_on": "both",
    },
}


def read(tmp_path, *path, value):
    run = copy.deepcopy(GOOD)
    inner = run
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file = tmp_path / "hook.json"
    file.write_text(json.dumps(run))
    return read_run(str(file))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("vision", "device"), None),
        (("vision", "device"), "cpu"),
        (("vision", "model"), None),
        (("vision", "dataset"), None),
        (("vision", "workers"), None),
        (("vision", "model", "mlp_ratio"), 2),
        (("vision", "sam_on"), "distillation"),
    ],
)
def test_a_good_description_is_read_as_it_is_written(tmp_path, path, value):
    inner = read(tmp_path, *path, value=value)
    for key in path:
        inner = inner[key]
    assert inner == value


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("vision",), [], "vision=[]: Input should be a valid dictionary"),
        (("vision", "devise"), "cpu", "vision has an unknown key 'devise'. Did you mean 'device'?"),
        (("vision", "model", "tasc"), 3, "vision.model has an unknown key 'tasc'."),
        (("tasc",), None, "has an unknown key 'tasc'. Did you mean 'task'?"),
        (("vision", "device"), "cuda", "vision.device='cuda': String should match pattern"),
        (("vision", "device"), 0, "vision.device=0: Input should be a valid string"),
        (("vision", "data"), "/no/such/folder", "vision.data='/no/such/folder': Value error, it does not exist"),
        (("vision", "weights"), 3, "vision.weights=3: Input should be a valid string"),
        (("vision", "workers"), -1, "vision.workers=-1: Input should be greater than or equal to 0"),
        (("vision", "workers"), True, "vision.workers=True: Input should be a valid integer"),
        (("vision", "sam_on"), None, "vision.sam_on=None: Input should be 'both', 'task' or 'distillation'"),
        (("vision", "model"), "tiny", "vision.model='tiny': Input should be a valid dictionary"),
        (("vision", "model"), {}, "vision.model has no 'img_size'"),
        (("vision", "model", "depth"), 1.5, "vision.model.depth=1.5: Input should be a valid integer"),
        (("vision", "model", "num_heads"), 0, "vision.model.num_heads=0: Input should be greater than 0"),
        (("vision", "dataset", "class"), "os.system", "vision.dataset.class='os.system': String should match pattern"),
        (("vision", "dataset", "seed"), "1", "vision.dataset.seed='1': Input should be a valid integer"),
        (("sam", "sync"), "global", "sam.sync='global': Input should be 'local'"),
        (("sam", "ascent_loss"), "task", "sam.ascent_loss='task': Input should be 'total'"),
        (("adapters",), "fp32", "adapters='fp32': Input should be 'upstream'"),
        (("task",), "amazon", "task='amazon': Input should be None"),
    ],
)
def test_a_bad_description_is_refused_with_the_place_and_what_was_expected(tmp_path, path, value, expected):
    with pytest.raises(UserError) as caught:
        read(tmp_path, *path, value=value)
    assert expected in str(caught.value)


def test_all_mistakes_are_named_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, "vision", value=GOOD["vision"] | {"device": "gpu", "sam_on": "none", "workers": 0.5})
    assert all(name in str(caught.value) for name in ("device", "sam_on", "workers"))
