"""Where things lie: the patches and their lock file in this project, and the checkouts they belong to."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError, did_you_mean
from flatpatch.patches.gitcalls import GitFailed, run_git

VARIABLE = "FLATPATCH_THIRD_PARTY"
CONFIG = "flatpatch.thirdParty"
# An unreachable host answers nothing; a big repository on a slow line takes its time.
PROBE_SECONDS = 15
CLONE_SECONDS = 900
_fetches = contextvars.ContextVar("fetches", default=True)


@dataclass(frozen=True)
class Workspace:
    """The project folder that holds ``patches/``, ``third_party/`` and ``build/``."""

    root: Path

    @property
    def lock_file(self) -> Path:
        """The file with each repository's pin and hashes."""
        return self.root / "patches" / "lock.json"

    def folder(self, repo: str) -> Path:
        """Return the folder with a repository's series and patches."""
        return self.root / "patches" / repo

    def submodule(self, repo: str) -> Path:
        """Return the project's own folder for a repository's checkout, filled or not."""
        return self.root / "third_party" / repo

    def repositories(self) -> list[str]:
        """Return the names of the repositories that have a series."""
        return sorted(series.parent.name for series in (self.root / "patches").glob("*/series"))

    def lock(self) -> dict[str, dict[str, Any]]:
        """Return what ``patches/lock.json`` says of each repository."""
        if not self.lock_file.exists():
            return {}
        try:
            content: dict[str, dict[str, Any]] = json.loads(self.lock_file.read_text())
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.lock_file}:{error.lineno} is not JSON: {error.msg}. Run: git checkout patches/lock.json"
            ) from error
        return content

    def recorded_url(self, repo: str) -> str:
        """Return the address in ``.gitmodules``, or an empty string."""
        return _config(self.root, "--file", ".gitmodules", f"submodule.third_party/{repo}.url")

    def recorded_pin(self, repo: str) -> str:
        """Return the commit that this project's git records for the submodule, or an empty string."""
        try:
            listed = run_git("ls-files", "-s", "--", f"third_party/{repo}", folder=self.root).decode()
        except GitFailed:  # not a clone, for instance an unpacked archive
            return ""
        return listed.split()[1] if listed.startswith("160000 ") else ""


PROJECT = Workspace(Path(__file__).resolve().parents[2])


def check_name(repo: str, workspace: Workspace) -> None:
    """Refuse a repository for which there is no folder in ``patches/``."""
    known = workspace.repositories()
    if repo not in known:
        raise UserError(
            f"unknown repository {repo!r}.{did_you_mean(repo, known)} "
            f"Known repositories: {', '.join(known)} (folders of {workspace.root / 'patches'} with a series file)."
        )


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """Look for checkouts as ever, but leave empty submodules empty."""
    token = _fetches.set(False)
    try:
        yield
    finally:
        _fetches.reset(token)


def find_checkout(repo: str, *, workspace: Workspace = PROJECT) -> Path:
    """Return the checkout of a repository.

    Looks in the folder that ``FLATPATCH_THIRD_PARTY`` names, then in that of ``git config flatpatch.thirdParty``, then
    in ``third_party/``, where an empty folder is filled with ``git submodule update --init``.

    Args:
        repo: Name of the repository, for instance ``N-LoRA``.
        workspace: The project.

    Returns:
        Absolute path of the checkout. What is in it has not been verified.

    Raises:
        UserError: If there is none; says where it was looked for and what to run.
    """
    check_name(repo, workspace)
    tried = []
    lacking: dict[str, Path] = {}
    for source, folder in _named_folders(workspace):
        if not folder:
            tried.append(f"{source}: not set")
            continue
        checkout = _checkout_in(folder, repo, workspace)
        if not (lack := _lack(checkout)):
            return checkout
        tried.append(f"{source}={folder}: {lack}")
        lacking[source] = checkout
    checkout = workspace.submodule(repo)
    if not (checkout / ".git").exists():
        if checkout.is_dir() and any(checkout.iterdir()):
            tried.append(f"{checkout}: is not a git checkout")
        elif not _fetches.get():
            tried.append(f"{checkout}: empty; a run tries to fill it")
        elif complaint := _fill_submodule(workspace, repo):
            tried.append(f"{checkout}: empty, and it could not be filled: {complaint}")
    if (checkout / ".git").exists():
        return checkout.resolve()
    places = "\n".join(f"    {place}" for place in tried)
    raise UserError(f"{repo} is not here. Looked in\n{places}\n{_advice(repo, workspace, lacking)}")


def _advice(repo: str, workspace: Workspace, lacking: Mapping[str, Path]) -> str:
    """Say how to get a repository; ``lacking`` has what names a folder without it, and where it would lie there."""
    config, unset = _config_commands(workspace)
    pin = workspace.recorded_pin(repo) or workspace.lock().get(repo, {}).get("pin", "PIN")
    root = shlex.quote(str(workspace.root))
    lines = [f"With network, run: git -C {root} submodule update --init --depth 1 third_party/{repo}"]
    for source, checkout in list(lacking.items())[:1]:
        if checkout.parent.is_file():
            continue
        if _is_repository(checkout.parent):  # a clone into it would lie inside another repository
            name = f"export {VARIABLE}=" if source == VARIABLE else f"{config} {CONFIG} "
            lines.append(
                f"or name the folder around the one that is named: {name}{shlex.quote(str(checkout.parent.parent))}"
            )
            continue
        into = shlex.quote(str(checkout))
        clone = f"git clone {workspace.recorded_url(repo) or 'ADDRESS'} {into} && git -C {into} checkout {pin}"
        lines.append(f"or, for the folder that is named: {clone}")
    lines += [
        f"If there is a checkout on this machine, run: export {VARIABLE}=<the folder that holds {repo}/>",
        f"or, once for all: {config} {CONFIG} <the folder that holds {repo}/>",
    ]
    forget = [f"unset {VARIABLE}" if source == VARIABLE else unset for source in lacking]
    if forget:
        lines.append(f"To forget a folder that is named, run: {'; '.join(forget)}")
    return "\n".join(f"  {line}" for line in lines)


def skipped_checkouts(repo: str, *, workspace: Workspace = PROJECT) -> list[str]:
    """Say of each folder that was named for checkouts, and is looked at first, why it does not serve a repository."""
    found: dict[str, Path] = {}
    for source, folder in _named_folders(workspace):
        if not folder:
            continue
        checkout = _checkout_in(folder, repo, workspace)
        if not (lack := _lack(checkout)):
            return list(found)
        found[f"{source}={folder} has no {repo}: {lack}"] = checkout
    own = workspace.submodule(repo).resolve()  # named or not, it is looked at, and filled
    return [said for said, checkout in found.items() if checkout != own]


def _named_folders(workspace: Workspace) -> tuple[tuple[str, str], ...]:
    """Return what names a folder of checkouts, first the one that is looked at first, with the folder or nothing."""
    return (
        (VARIABLE, os.environ.get(VARIABLE, "")),
        (f"git config {CONFIG}", _config(workspace.root, "--type=path", CONFIG)),
    )


def _checkout_in(folder: str, repo: str, workspace: Workspace) -> Path:
    return (workspace.root / Path(folder).expanduser() / repo).resolve()


def _lack(checkout: Path) -> str:
    """Return why a folder is no checkout, or an empty string."""
    if os.path.exists(checkout / ".git"):
        return ""
    if _is_repository(checkout.parent):
        return f"{checkout.parent} is itself a git checkout; name the folder that holds it, {checkout.parent.parent}"
    if os.path.exists(checkout):
        return f"{checkout} is not a git checkout"
    if os.path.isfile(checkout.parent):
        return f"{checkout.parent} is a file; name the folder that holds the checkouts"
    return f"{checkout} does not exist" + ("" if os.path.isdir(checkout.parent) else f", nor does {checkout.parent}")


def _is_repository(folder: Path) -> bool:
    return os.path.exists(folder / ".git")


def is_available(repo: str, *, workspace: Workspace = PROJECT) -> tuple[bool, str]:
    """Say whether a checkout is here, and where, or why not. May try to fill the submodule; never raises."""
    try:
        return True, str(find_checkout(repo, workspace=workspace))
    except Exception as error:
        return False, str(error)


def _config(root: Path, *arguments: str) -> str:
    # Status 1: not set. Anything else (no such file, not a repository) means the same here.
    return run_git("config", "--get", *arguments, folder=root, allowed=range(256)).decode().strip()


def _config_commands(workspace: Workspace) -> tuple[str, str]:
    """Return what sets the folder of checkouts for good (key and value follow), and what removes it there."""
    kind, _, file = _config(workspace.root, "--show-origin", "-z", CONFIG).partition("\0")[0].partition(":")
    if kind == "command line":
        return "git config --global", "unset GIT_CONFIG_COUNT GIT_CONFIG_PARAMETERS"
    command = "git config --global"
    if kind == "file":
        # Git names the clone's own file by a relative path.
        own = f"git -C {shlex.quote(str(workspace.root))} config"
        command = f"git config --file {shlex.quote(file)}" if os.path.isabs(file) else own
    return command, f"{command} --unset-all {CONFIG}"


@functools.cache
def _fill_submodule(workspace: Workspace, repo: str) -> str:
    """Clone the pinned commit into ``third_party/``; return what went wrong, if anything. Tried once per process."""
    name = f"third_party/{repo}"
    url = _config(workspace.root, f"submodule.{name}.url") or workspace.recorded_url(repo)
    if not url or not workspace.recorded_pin(repo):
        return f"{name} is not recorded as a submodule of {workspace.root}"
    try:
        run_git("ls-remote", "--quiet", url, "HEAD", folder=workspace.root, seconds=PROBE_SECONDS)
        run_git(
            *("submodule", "--quiet", "update", "--init", "--depth", "1", "--", name),
            folder=workspace.root,
            seconds=CLONE_SECONDS,
        )
    except GitFailed as error:
        return str(error).splitlines()[-1]
    return ""
