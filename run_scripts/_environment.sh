# Sourced by the scripts beside it: makes .venv from requirements.lock on first use, reuses it afterwards,
# puts its programs first on PATH and goes to the project's folder.
#
# FLATPATCH_PYTHON=/path/to/python3.11 says which Python makes it; default: the first 3.11, else 3.10, on PATH.
# With uv on PATH, uv installs (and can fetch a Python); else Python's own venv and pip do.
#
# Only an environment with the right stamp is used. The stamp is written last and holds the lock and this
# folder's name, since an environment does not survive being moved. Anything else called .venv is made again;
# if it is a link, what it points to is refilled, so that it may lie on another disk.

# What cannot be checked is no reason to make .venv again: say what is missing, and change nothing.
flatpatch_need() {
  local tool
  for tool; do
    if ! type -P -- "$tool" >/dev/null; then
      echo "flatpatch: the program '$tool' is not on PATH, and run_scripts/ needs it. Nothing was changed. Put its folder" \
        "on PATH (often /usr/bin), or install it." >&2
      exit 2
    fi
  done
}

flatpatch_need dirname readlink
flatpatch_root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
flatpatch_venv=$(readlink -m -- "$flatpatch_root/.venv") # python -m venv takes no link
flatpatch_lock=$flatpatch_root/requirements.lock
if ! [ -r "$flatpatch_lock" ]; then
  echo "flatpatch: $flatpatch_lock cannot be read. Nothing was changed. To get it back:" \
    "git -C $flatpatch_root checkout -- requirements.lock" >&2
  exit 2
fi

flatpatch_stamp() {
  printf '# %s\n%s\n' "$flatpatch_root" "$(<"$flatpatch_lock")"
}

# The stamp is right, Python starts, and every package that the lock gives to all machines is there.
flatpatch_is_healthy() {
  local stamp=$flatpatch_venv/flatpatch-stamp
  [ -f "$stamp" ] && [ "$(<"$stamp")" = "$(flatpatch_stamp)" ] || return 1
  "$flatpatch_venv/bin/python" -I - "$flatpatch_lock" 2>/dev/null <<'PYTHON'
import importlib.metadata, re, sys
for line in open(sys.argv[1]):
    pin = re.match(r"([\w.-]+)==[^;]*$", line)
    if pin:
        importlib.metadata.distribution(pin[1])
PYTHON
}

# Sets python to one that will do, or else seen to what there is.
flatpatch_find_python() {
  local modules=$1 candidate candidates version
  seen=""
  if [ -n "${FLATPATCH_PYTHON:-}" ]; then
    candidates=$(type -P -- "$FLATPATCH_PYTHON") || seen="  FLATPATCH_PYTHON=$FLATPATCH_PYTHON is not a program"$'\n'
  else
    candidates=$(type -aP python3.11 python3.10 python3 python) || true
  fi
  while IFS= read -r candidate; do
    [ -n "$candidate" ] || continue
    version=$("$candidate" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null) || version=""
    case $version in
      3.10 | 3.11)
        if "$candidate" -I -c "import $modules" 2>/dev/null </dev/null; then
          python=$candidate
          return 0
        fi
        seen+="  $candidate: $version, but no venv module (Debian, Ubuntu: apt install python$version-venv)"$'\n'
        ;;
      "") seen+="  $candidate: does not start"$'\n' ;;
      *) seen+="  $candidate: $version"$'\n' ;;
    esac
  done <<<"$candidates"
  return 1
}

flatpatch_no_python() {
  cat <<MESSAGE
flatpatch makes its environment with Python 3.10 or 3.11. Found:
${seen:-  no Python on PATH
}Install one of the two, or uv (docs.astral.sh/uv), which fetches its own; or name one that is elsewhere:
  FLATPATCH_PYTHON=/path/to/python3.11 bash $0
MESSAGE
  return 2
}

# The hundreds of lines of an installation, as one line on a terminal and none elsewhere; all go to a log.
flatpatch_progress() {
  local line last=""
  # Each second the clock moves on, also while one big package is unpacked (read ends with 142: nothing new).
  while IFS= read -r -t 1 line || [ $? -gt 128 ]; do
    if [ -n "$line" ]; then
      last=${line:0:70}
      printf '%s\n' "$line" >>"$flatpatch_venv/install.log"
    fi
    [ ! -t 2 ] || printf '\r\033[K%4d s  %s' "$SECONDS" "$last" >&2
  done
  [ ! -t 2 ] || printf '\r\033[K' >&2
}

flatpatch_install() {
  local python="" seen site setuptools
  # Settings meant for other installs; the address of a mirror and the like stay.
  unset PIP_CONSTRAINT PIP_NO_BINARY PIP_ONLY_BINARY PIP_PREFIX PIP_PYTHON PIP_REQUIRE_HASHES PIP_ROOT PIP_TARGET
  unset UV_CONSTRAINT UV_NO_BINARY UV_NO_BUILD UV_ONLY_BINARY UV_OVERRIDE UV_REQUIRE_HASHES UV_SYSTEM_PYTHON
  export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 DS_BUILD_OPS=0
  if uv --version >/dev/null 2>&1; then
    if flatpatch_find_python sys; then
      uv venv --quiet --no-project --python "$python" "$flatpatch_venv" || return 1
    elif [ -n "${FLATPATCH_PYTHON:-}" ] || ! uv venv --quiet --no-project --python 3.11 "$flatpatch_venv"; then
      flatpatch_no_python || return
    fi
    set -- uv pip install --python "$flatpatch_venv/bin/python" --no-deps --compile-bytecode
  else
    flatpatch_find_python ensurepip,venv || flatpatch_no_python || return
    "$python" -I -m venv "$flatpatch_venv" || return 1
    set -- "$flatpatch_venv/bin/python" -I -m pip install --no-deps --use-pep517 --progress-bar off
  fi
  # The two packages without a wheel are built by the locked setuptools, not by whatever is newest today.
  setuptools=$(grep '^setuptools==' "$flatpatch_lock")
  if ! { "$@" "$setuptools" && "$@" --no-build-isolation -r "$flatpatch_lock"; } 2>&1 | flatpatch_progress; then
    tail -n 15 "$flatpatch_venv/install.log"
    echo "That is the end of .venv/install.log."
    return 1
  fi
  # Lets `python -m flatpatch` find the package from any folder.
  site=$("$flatpatch_venv/bin/python" -I -c 'import site; print(site.getsitepackages()[0])')
  printf '%s\n' "$flatpatch_root" >"$site/flatpatch.pth"
  flatpatch_stamp >"$flatpatch_venv/flatpatch-stamp"
}

flatpatch_make_environment() (
  # Held until this subshell ends, however it ends. Where files cannot be locked, two first uses may clash.
  exec 9>>"$flatpatch_root/.venv.lock"
  if command -v flock >/dev/null && ! flock -n 9 2>/dev/null; then
    echo "Waiting for another script that is making .venv ..."
    flock 9 || true
    ! flatpatch_is_healthy || return 0
  fi
  echo "Making .venv, once: about 7 GB on disk, a few minutes ..."
  rm -f -- "$flatpatch_venv/flatpatch-stamp"
  mkdir -p -- "$flatpatch_venv" && find "$flatpatch_venv/" -mindepth 1 -delete || return 1
  status=0
  flatpatch_install || status=$?
  case $status in
    0)
      if ! flatpatch_is_healthy; then
        echo "The packages did not end up in .venv. Is there a target or a prefix in: pip config list ?"
        return 1
      fi
      echo "Made .venv in $SECONDS s."
      ;;
    2) ;; # flatpatch_no_python has said why
    *) echo "Making .venv failed. The next call starts it again." ;;
  esac
  return "$status"
)

# What --help says while there is no .venv, so that nobody waits for an installation to read it: the script's own
# comment and the settings that matter most.
flatpatch_early_help() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" | sed '/--help  *# all settings$/d'
  case ${0##*/} in
    run.sh)
      cat <<'MESSAGE'

Verbs: run, sweep, compare, report, measure, patches, doctor. Each has its own --help.
MESSAGE
      ;;
    test.sh) return ;;
    exp*.sh)
      cat <<'MESSAGE'

Words are key=value, with their defaults:
  profile=auto        quick: a miniature, minutes on two CPU cores; small: a real encoder; record: the record's own size
  seeds=0..2          the seeds
  grid=short          full: every value that the study names
  parallel=0          runs that go at once; 0: as many as fit, one GPU each or by their threads
  output=runs         where the runs are; the verdicts are in runs/studies/
  device=, model=, data=   as for run, for all runs
  --dry-run           plan everything and start nothing

All words are listed by the same command once .venv is there: the first call without --help makes it (about 7 GB, a few
minutes).
MESSAGE
      return
      ;;
  esac
  cat <<'MESSAGE'

Settings are key=value. Those that matter most, with their defaults:
  sam=off             off, sam, asam, or random (a control); the scripts called ..._sam.sh set sam=sam
  rho=0.05            radius of SAM's perturbation
  profile=auto        upstream: the authors' own settings, on a GPU; quick: small model and data, minutes on the CPU
  engine=auto         upstream: the authors' code, patched; reference: our small implementation
  seed=42             random seed (InfLoRA: 0, CL-LoRA: 1993, SD-LoRA: 1993 or 1995)
  order=1             text: task order
  benchmark=          images: cifar100, imagenet_r, ...; default: cifar100
  model=, data=       the pretrained model, the benchmark's folder
  measure=            flatness to measure in the run: all, or some of eigenvalues, trace, density, landscape, ...
  run=, output=runs   name of the run's folder, and where it is made
  --dry-run           print the commands and how they differ from the authors' own, and start nothing
  --quiet             print the result alone

examples:
  bash run_scripts/nlora_sam.sh rho=0.05
  bash run_scripts/nlora_sam.sh profile=upstream rho=0.05 --dry-run
  bash run_scripts/inflora_sam.sh rho=0.05 measure=eigenvalues,trace
  bash run_scripts/run.sh sweep method=nlora sam=off,sam seed=0..2

All settings are listed by the same command once .venv is there: the first call without --help makes it (about 7 GB, a
few minutes).
MESSAGE
}

unset PYTHONHOME PYTHONPATH PYTHONSAFEPATH # another environment's packages would come before ours
if ! flatpatch_is_healthy; then
  case " $* " in
    *" --help "* | *" -h "*) # the script's own comment; no reason to wait for an installation
      flatpatch_need cat sed
      flatpatch_early_help
      exit 0
      ;;
  esac
  flatpatch_need cat find grep mkdir rm tail
  flatpatch_make_environment >&2 || exit
fi
export PATH=$flatpatch_venv/bin:$PATH VIRTUAL_ENV=$flatpatch_venv
cd -- "$flatpatch_root"
