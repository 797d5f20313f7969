"""run_scripts/_environment.sh, in copies of the project, with stand-ins for pip and uv that install nothing."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

from flatpatch.settings import Settings
from flatpatch.studies.command import KEYS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "run_scripts").glob("[!_]*.sh"))
TOOLS = [
    "bash",
    "cat",
    "dirname",
    "env",
    "find",
    "flock",
    "grep",
    "mkdir",
    "readlink",
    "rm",
    "sed",
    "sleep",
    "tail",
]
FAST = "not slow and not third_party"
LOCK = "setuptools==1.0\ntiny==2.0\nelsewhere==3.0 ; sys_platform == 'win32'\n"

# What the scripts start. Says what it was given and where it ran.
MAIN = """
import json, os, shutil, sys
print(json.dumps({"arguments": sys.argv[1:], "prefix": sys.prefix, "folder": os.getcwd(),
                  "python": shutil.which("python")}))
"""

# A pip that writes down its call and leaves what an installed package leaves.
PIP = """
import os, pathlib, site, sys, time
with open(os.environ["CALLS"], "a") as calls:
    settings = [name for name in ("PIP_TARGET", "PYTHONPATH", "PYTHONHOME") if name in os.environ]
    print("install", os.environ["PIP_USER"], *settings, *sys.argv[2:], file=calls)
time.sleep(float(os.environ.get("SECONDS_TO_INSTALL", "0")))
if os.environ.get("NO_NETWORK"):
    sys.exit("no network")
for line in pathlib.Path(sys.argv[-1]).read_text().splitlines() if "-r" in sys.argv else []:
    if ";" not in line:
        name = line.replace("==", "-") + ".dist-info"
        pathlib.Path(site.getsitepackages()[0], name).mkdir(exist_ok=True)
"""

# A Python whose `-m venv` brings the pip above.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *ensurepip*) exit 0 ;;
  *"-m venv"*)
    echo venv >>"$CALLS"
    "{real}" -I -m venv --without-pip "${{@: -1}}"
    mkdir -p "${{@: -1}}/lib/python{version}/site-packages/pip"
    cat "$PIP_STAND_IN" >"${{@: -1}}/lib/python{version}/site-packages/pip/__main__.py" ;;
  *) exec "{real}" "$@" ;;
esac
"""

UV = """#!/usr/bin/env bash
case "$1 $2" in
  "--version ") ;;
  venv*) echo "uv $*" >>"$CALLS"; [ -z "$NO_NETWORK" ] && "{real}" -I -m venv --without-pip "${{@: -1}}" ;;
  *) echo "uv pip" >>"$CALLS"; "{real}" -c 'import sys; sys.exit("--python" not in sys.argv)' "$@" &&
     "$4" "$PIP_STAND_IN" "$@" ;;
esac
"""


@dataclass
class Project:
    """A copy of the project's scripts and a machine with a few programs."""

    root: Path
    programs: Path
    calls_file: Path
    pip: Path

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def add_program(self, name: str, text: str) -> Path:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": str(self.programs),
            "CALLS": str(self.calls_file),
            "PIP_STAND_IN": str(self.pip),
            "HOME": str(self.programs),
        }

    def start(self, *arguments: str, script: str = "nlora_sam.sh", **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.root / "run_scripts" / script), *arguments],
            cwd=self.programs,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, script: str = "nlora_sam.sh", **variables: str) -> tuple[int, str, str]:
        process = self.start(*arguments, script=script, **variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err


VERSION = "{}.{}".format(*sys.version_info)
REAL_PYTHON = getattr(sys, "_base_executable", sys.executable)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project in a folder with spaces, on a machine with one suitable Python and no uv."""
    root = tmp_path / "a project"
    shutil.copytree(ROOT / "run_scripts", root / "run_scripts")
    (root / "requirements.lock").write_text(LOCK)
    (root / "flatpatch").mkdir()
    (root / "flatpatch" / "__main__.py").write_text(MAIN)
    (root / "pytest.py").write_text(MAIN)
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        if found:
            (programs / tool).symlink_to(found)
    pip = tmp_path / "pip.py"
    pip.write_text(PIP)
    made = Project(root, programs, tmp_path / "calls", pip)
    made.add_program(f"python{VERSION}", PYTHON.format(real=REAL_PYTHON, version=VERSION))
    return made


def without_python(project: Project) -> Project:
    (project.programs / f"python{VERSION}").unlink()
    return project


def stands_for(version: str) -> str:
    return f"#!/usr/bin/env bash\necho {version}\n"


def test_first_use_makes_the_environment_and_forwards_the_arguments(project: Project) -> None:
    code, out, err = project.run("rho=0.1", "name=two words")
    assert code == 0, err
    said = json.loads(out)
    assert said["arguments"] == ["run", "method=nlora", "sam=sam", "rho=0.1", "name=two words"]
    assert said["prefix"] == str(project.venv)
    assert said["folder"] == str(project.root)
    assert said["python"] == str(project.venv / "bin" / "python")
    assert "Making .venv" in err


def test_script_is_found_by_a_relative_name_whatever_cdpath_says(project: Project, tmp_path: Path) -> None:
    (tmp_path / "run_scripts").mkdir()
    command = ["bash", "run_scripts/nlora_sam.sh"]
    variables = {**project.environment, "CDPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=project.root, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(project.root)


def test_environments_python_finds_the_package_from_any_folder(project: Project) -> None:
    project.run()
    command = [str(project.venv / "bin" / "python"), "-m", "flatpatch", "doctor"]
    done = subprocess.run(command, cwd=project.programs, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["arguments"] == ["doctor"]


def test_pip_gets_the_lock_and_the_locked_build_tool(project: Project) -> None:
    project.run()
    assert project.calls == [
        "venv",
        "install 0 --no-deps --use-pep517 --progress-bar off setuptools==1.0",
        "install 0 --no-deps --use-pep517 --progress-bar off --no-build-isolation -r "
        + str(project.root / "requirements.lock"),
    ]


def test_healthy_environment_is_reused_without_a_word(project: Project) -> None:
    project.run()
    calls = project.calls
    code, out, err = project.run("rho=0.2")
    assert (code, err) == (0, "")
    assert "rho=0.2" in out
    assert project.calls == calls


def contents(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if "__pycache__" not in path.parts)


def test_healthy_environment_is_reused_when_the_tools_that_make_one_are_not_on_path(project: Project) -> None:
    project.run()
    before, calls = contents(project.root), project.calls
    for tool in {*TOOLS} - {"bash", "dirname", "env", "readlink"}:
        (project.programs / tool).unlink(missing_ok=True)
    code, out, err = project.run("doctor", script="run.sh")
    assert (code, err) == (0, "")
    assert "doctor" in out
    assert (contents(project.root), project.calls) == (before, calls)


def test_missing_tool_is_named_and_nothing_changes(project: Project) -> None:
    project.run()
    for tool in ("readlink", "cat", "find", "grep", "mkdir", "rm", "tail"):
        if tool == "cat":  # from here on the environment has to be made again
            remove_package(project)
        before, calls = contents(project.root), project.calls
        (project.programs / tool).rename(project.programs / f"no-{tool}")
        code, out, err = project.run("doctor", script="run.sh")
        (project.programs / f"no-{tool}").rename(project.programs / tool)
        assert (code, out) == (2, ""), tool
        assert f"the program '{tool}' is not on PATH" in err and len(err.splitlines()) == 1
        assert (contents(project.root), project.calls) == (before, calls)


def test_missing_lock_is_named_and_the_environment_stays(project: Project) -> None:
    project.run()
    (project.root / "requirements.lock").unlink()
    before, calls = contents(project.root), project.calls
    code, out, err = project.run("doctor", script="run.sh")
    assert (code, out) == (2, "")
    assert "requirements.lock cannot be read" in err and len(err.splitlines()) == 1
    assert (contents(project.root), project.calls) == (before, calls)


def remove_stamp(project: Project) -> None:
    (project.venv / "flatpatch-stamp").unlink()


def change_lock(project: Project) -> None:
    (project.root / "requirements.lock").write_text(LOCK + "another==4.0\n")


def move_project(project: Project) -> None:
    project.root = project.root.rename(project.root.with_name("moved"))


def remove_python(project: Project) -> None:
    (project.venv / "bin" / "python").unlink()


def remove_package(project: Project) -> None:
    next(project.venv.glob("lib/*/site-packages/tiny-2.0.dist-info")).rmdir()


@pytest.mark.parametrize("damage", [remove_stamp, change_lock, move_project, remove_python, remove_package])
def test_environment_is_made_again_after(project: Project, damage) -> None:
    project.run()
    (project.venv / "left over").touch()
    damage(project)
    code, out, err = project.run()
    assert code == 0, err
    assert json.loads(out)["prefix"] == str(project.venv)
    assert project.calls.count("venv") == 2
    assert not (project.venv / "left over").exists()


def test_link_to_another_disk_is_kept(project: Project, tmp_path: Path) -> None:
    project.venv.symlink_to(tmp_path / "other disk" / "environment")
    code, _, err = project.run()
    assert code == 0, err
    assert project.venv.is_symlink()
    assert (tmp_path / "other disk" / "environment" / "flatpatch-stamp").exists()


def test_failed_installation_is_not_used_and_is_tried_again(project: Project) -> None:
    code, out, err = project.run(NO_NETWORK="1")
    assert (code, out) == (1, "")
    assert "no network" in err and "Making .venv failed" in err
    assert not (project.venv / "flatpatch-stamp").exists()
    code, _, err = project.run()
    assert code == 0, err


def test_package_that_did_not_arrive_is_an_error(project: Project) -> None:
    project.pip.write_text(PIP.replace(".mkdir(exist_ok=True)", ""))
    code, out, err = project.run()
    assert (code, out) == (1, "")
    assert "pip config list" in err


@pytest.mark.skipif(shutil.which("flock") is None, reason="this machine cannot lock files from a script")
def test_two_scripts_started_together_make_one_environment(project: Project) -> None:
    both = [project.start(SECONDS_TO_INSTALL="0.4") for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert project.calls.count("venv") == 1
    assert any("Waiting for another script" in err for _, err in said)


def test_settings_of_other_environments_are_not_followed(project: Project, tmp_path: Path) -> None:
    code, out, err = project.run(
        PIP_USER="1",
        PIP_TARGET=str(tmp_path),
        PIP_REQUIRE_VIRTUALENV="1",
        PYTHONHOME=str(tmp_path),
        PYTHONPATH=str(tmp_path),
        VIRTUAL_ENV=str(tmp_path),
        CDPATH=str(tmp_path),
    )
    assert code == 0, err
    assert json.loads(out)["prefix"] == str(project.venv)
    assert {line.split(" --")[0] for line in project.calls[1:]} == {"install 0"}


@pytest.mark.parametrize("version", ["3.9", "3.12", "3.14"])
def test_unsuitable_python_is_one_message_and_exit_2(project: Project, version: str) -> None:
    path = without_python(project).add_program("python3", stands_for(version))
    code, out, err = project.run()
    assert (code, out) == (2, "")
    assert f"{path}: {version}\n" in err
    assert "3.10 or 3.11" in err and "FLATPATCH_PYTHON=" in err
    assert not (project.venv / "bin").exists()


def test_machine_without_python_is_one_message_and_exit_2(project: Project) -> None:
    code, out, err = without_python(project).run()
    assert (code, out) == (2, "")
    assert "no Python on PATH" in err


def test_python_that_does_not_start_is_passed_over(project: Project) -> None:
    (project.programs / f"python{VERSION}").rename(project.programs / "python3")
    broken = project.add_program("python3.11", "#!/usr/bin/env bash\nexit 127\n")
    code, _, err = project.run()
    assert code == 0, err
    (project.programs / "python3").unlink()
    remove_stamp(project)
    code, _, err = project.run()
    assert code == 2
    assert f"{broken}: does not start" in err


def test_python_without_venv_names_the_package_to_install(project: Project) -> None:
    without_python(project).add_program(
        "python3.11", "#!/usr/bin/env bash\ncase $* in *ensurepip*) exit 1 ;; *) echo 3.11 ;; esac\n"
    )
    code, _, err = project.run()
    assert code == 2
    assert "apt install python3.11-venv" in err


def test_named_python_comes_before_those_on_path(project: Project) -> None:
    other = project.programs / "elsewhere"
    (project.programs / f"python{VERSION}").rename(other)
    project.add_program("python3.11", "#!/usr/bin/env bash\necho 3.11\n")
    code, _, err = project.run(FLATPATCH_PYTHON=str(other))
    assert code == 0, err


@pytest.mark.parametrize("with_uv", [False, True])
def test_named_python_that_is_not_there_is_an_error(project: Project, with_uv: bool) -> None:
    if with_uv:
        project.add_program("uv", UV.format(real=REAL_PYTHON))
    code, _, err = project.run(FLATPATCH_PYTHON="/nowhere/python")
    assert code == 2
    assert "FLATPATCH_PYTHON=/nowhere/python is not a program" in err
    assert project.calls == []


def test_uv_is_preferred_and_given_the_python_found(project: Project) -> None:
    project.add_program("uv", UV.format(real=REAL_PYTHON))
    code, out, err = project.run()
    assert code == 0, err
    assert json.loads(out)["prefix"] == str(project.venv)
    python = project.programs / f"python{VERSION}"
    assert project.calls[0] == f"uv venv --quiet --no-project --python {python} {project.venv}"
    assert "venv" not in project.calls


def test_uv_fetches_a_python_where_none_will_do(project: Project) -> None:
    without_python(project).add_program("uv", UV.format(real=REAL_PYTHON))
    project.add_program("python3", stands_for("3.13"))
    code, _, err = project.run()
    assert code == 0, err
    assert "--python 3.11 " in project.calls[0]


def test_uv_that_cannot_fetch_a_python_is_one_message_and_exit_2(project: Project) -> None:
    without_python(project).add_program("uv", UV.format(real=REAL_PYTHON))
    code, _, err = project.run(NO_NETWORK="1")
    assert code == 2
    assert "no Python on PATH" in err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_before_the_first_use_is_the_usage_comment(project: Project, script: str) -> None:
    code, out, err = project.run("--help", script=script)
    assert (code, err) == (0, "")
    assert f"bash run_scripts/{script}" in out and "set -" not in out
    assert not project.venv.exists()


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith("exp")])
def test_help_of_a_study_before_the_first_use_tells_its_words(project: Project, script: str) -> None:
    _, out, _ = project.run("--help", script=script)
    told = set(re.findall(r"\b(\w+)=", out[out.index("with their defaults:") :]))
    assert {"profile", "seeds", "grid", "parallel", "output"} <= told <= set(KEYS)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if not name.startswith(("exp", "test"))])
def test_help_before_the_first_use_tells_the_settings_with_their_defaults(project: Project, script: str) -> None:
    _, out, _ = project.run("--help", script=script)
    assert "# all settings" not in out, "it does not send the reader to itself"
    defaults = {item.name: str(item.default) for item in dataclasses.fields(Settings)}
    told = dict(re.findall(r"(\w+)=(\S*?)(?:,|\s)", out[out.index("with their defaults:") : out.index("examples:")]))
    told = {key: value for key, value in told.items() if key != "sam" or value == "off"}
    assert {"rho", "profile", "engine", "seed", "order", "benchmark", "model", "data", "measure", "run"} <= set(told)
    assert {key: defaults[key] for key in told} == told
    for named in re.findall(r"run_scripts/(\w+[.]sh)", out):
        assert named in SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_executable_and_only_forwards(script: str) -> None:
    path = ROOT / "run_scripts" / script
    assert os.access(path, os.X_OK)
    code = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert code[:2] == ["set -euo pipefail", 'source "$(dirname -- "${BASH_SOURCE[0]}")/_environment.sh"']
    *choice, last = code[2:]
    assert re.fullmatch(r'exec python -m (flatpatch|pytest)\b[\w= -]* "\$@"', last)
    assert len(choice) == (script == "test.sh")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["-m", FAST]),
        (["-k", "two words"], ["-m", FAST, "-k", "two words"]),
        (["all"], []),
        (["all", "-x"], ["-x"]),
    ],
)
def test_tests_are_the_fast_ones_or_all(words: list[str], expected: list[str], project: Project) -> None:
    code, out, err = project.run(*words, script="test.sh")
    assert code == 0, err
    assert json.loads(out)["arguments"] == ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal", *expected]


def read_lock() -> dict[str, tuple[str, str]]:
    """Return each package's version and marker."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [re.fullmatch(r"([\w.-]+)==(\S+)(?: ; (.+))?", line) for line in lines if not line.startswith("#")]
    assert all(pins)
    found = {pin[1].lower(): (pin[2], pin[3] or "") for pin in pins if pin}
    assert len(found) == len(pins), "a package has one version, on every Python"
    return found


def test_lock_satisfies_every_dependency_of_the_project() -> None:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = read_lock()
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(text)
        version, marker = lock[wanted.name.lower().replace("_", "-")]
        assert version in wanted.specifier and not marker, text


def test_lock_asks_for_cuda_on_linux_x86_alone() -> None:
    mac = {"platform_machine": "arm64", "sys_platform": "darwin", "platform_system": "Darwin"}
    cuda = {name: marker for name, (_, marker) in read_lock().items() if name.startswith(("nvidia-", "triton"))}
    assert cuda
    assert not any(Marker(marker).evaluate(mac) for marker in cuda.values())
