"""``python -m flatpatch patches <verb> key=value ...``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from flatpatch.errors import FlatpatchError, UserError, did_you_mean
from flatpatch.patches.checks import verify, verify_patches
from flatpatch.patches.copies import build
from flatpatch.patches.upkeep import drift, refresh, show
from flatpatch.patches.workspace import PROJECT, Workspace, check_name, is_available, skipped_checkouts
from flatpatch.settings import read_words

HELP = """\
usage: python -m flatpatch patches <verb> [repo=NAME] [key=value ...]

  verify    are patches, lock file and checkout what they should be? (offline; all repositories without repo=)
  apply     make the disposable copy build/<Repo>-<tree>/ and print where it is   [patched=true|false]
  show      print each patch with upstream's lines around it
  refresh   write patches and lock file anew: after an edit of the copy or of a patch, or after a new pin
  drift     try the patches on upstream's newest commit, or on another one        [commit=HASH]

examples:
  python -m flatpatch patches verify
  python -m flatpatch patches apply repo=N-LoRA patched=false
  python -m flatpatch patches show repo=O-LoRA
  python -m flatpatch patches drift repo=N-LoRA commit=<40 hex digits>

Checkouts are looked for in FLATPATCH_THIRD_PARTY, then git config flatpatch.thirdParty, then third_party/.
patches/README.md says what a patch may be and how to change one.
"""


def cli(arguments: Sequence[str], *, workspace: Workspace = PROJECT) -> int:
    """Run one verb.

    Args:
        arguments: The words after ``patches``.
        workspace: The project.

    Returns:
        The exit code: 0.

    Raises:
        UserError: If the words make no sense or something does not verify.
        FlatpatchError: If drift finds that a patch does not apply, or git fails.
    """
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(HELP, end="")
        return 0
    verb, *words = arguments
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}.{did_you_mean(verb, VERBS)} Known verbs: {', '.join(VERBS)}.")
    function, keys = VERBS[verb]
    settings = _read(verb, words, keys)
    if "repo" in settings:
        check_name(settings["repo"], workspace)
    for repo in [settings["repo"]] if "repo" in settings else workspace.repositories():
        for lack in skipped_checkouts(repo, workspace=workspace):
            print(f"note: {lack}")
    function(settings, workspace)
    return 0


def _read(verb: str, words: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    settings, problems = read_words(f"patches {verb}", words, keys)
    if (settings.get("patched") or "true") not in ("true", "false"):
        problems.append(f"patched={settings['patched']} is neither true nor false.")
    if not re.fullmatch(r"[0-9a-f]{4,40}", settings.get("commit") or "0000"):
        problems.append(
            f"commit={settings['commit']} is no commit (expected its hash, 40 hex digits, or at least 4 of them)."
        )
    if problems:
        raise UserError.collect(problems)
    return settings


def _verify(settings: dict[str, str], workspace: Workspace) -> None:
    problems = []
    named = settings.get("repo")
    for repo in [named] if named else workspace.repositories():
        try:
            here, _ = is_available(repo, workspace=workspace)
            if here or named:
                found = verify(repo, workspace=workspace)
                lacking = f", a partial checkout that lacks {len(found.absent)} files" if found.absent else ""
                trees = f"pin {found.pin[:12]}, patched tree {found.patched_tree[:12]}"
                print(f"{repo}: ok, {trees}, {found.checkout}{lacking}")
            else:
                verify_patches(repo, workspace=workspace)
                print(f"{repo}: not here, patches checked alone and ok (to see why not: patches verify repo={repo})")
        except FlatpatchError as error:
            print(f"{repo}: refused")
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _apply(settings: dict[str, str], workspace: Workspace) -> None:
    for repo in _here(settings, workspace):
        built = build(repo, patched=settings.get("patched", "true") == "true", workspace=workspace)
        if built.set_aside:
            print(f"{repo}: an edited copy stood in the way; it is now {built.set_aside}")
        print(f"{repo}: {built.path}")


def _show(settings: dict[str, str], workspace: Workspace) -> None:
    for repo in _here(settings, workspace):
        print(show(repo, workspace=workspace))


def _refresh(settings: dict[str, str], workspace: Workspace) -> None:
    if "repo" not in settings:
        raise UserError(f"patches refresh needs repo=NAME, one of {', '.join(workspace.repositories())}.")
    written = refresh(settings["repo"], workspace=workspace)
    print(f"{settings['repo']}: {'wrote ' + ', '.join(written) if written else 'all up to date'}")


def _drift(settings: dict[str, str], workspace: Workspace) -> None:
    if "commit" in settings and "repo" not in settings:
        raise UserError("commit= is a commit of one repository; give repo=NAME too.")
    failed = []
    for repo in _here(settings, workspace):
        found = drift(repo, commit=settings.get("commit"), workspace=workspace)
        print(
            f"{repo}: pin {found.pin[:12]}, tried on {found.commit}: {'applies' if found.applies else 'does not apply'}"
        )
        print("".join(f"  {line}\n" for line in found.report), end="")
        if not found.applies:
            failed.append(repo)
    if failed:
        raise FlatpatchError(f"patches of {', '.join(failed)} do not apply to the commit tried; the pins still hold.")


def _here(settings: dict[str, str], workspace: Workspace) -> list[str]:
    """Return the repository that was named, or all whose checkout is here."""
    if "repo" in settings:
        return [settings["repo"]]
    found = []
    for repo in workspace.repositories():
        here, _ = is_available(repo, workspace=workspace)
        if here:
            found.append(repo)
        else:
            print(f"{repo}: not here, left out")
    return found


VERBS: dict[str, tuple[Callable[[dict[str, str], Workspace], None], tuple[str, ...]]] = {
    "verify": (_verify, ("repo",)),
    "apply": (_apply, ("repo", "patched")),
    "show": (_show, ("repo",)),
    "refresh": (_refresh, ("repo",)),
    "drift": (_drift, ("repo", "commit")),
}
