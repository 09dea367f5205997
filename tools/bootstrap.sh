# Sourced by tools/quickstart and tools/test: makes .venv beside this checkout and installs megamask into it.
# Installs once per content of constraints.txt and pyproject.toml; a second call takes no time.

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3.12 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  echo "error: no Python 3.11 or 3.12 found; set PYTHON=/path/to/python3.11 and run again" >&2
  return 2
}

# A GPU machine brings its own torch build: then the environment sees the system's packages and torch is not installed.
has_cuda_torch() {
  "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
}

bootstrap() {
  local extras=$1 python stamp
  stamp=$(cat constraints.txt pyproject.toml | sha256sum | cut -d' ' -f1)
  # what tools/test installs contains what tools/quickstart needs
  if grep -qsxF -e "$stamp $extras" -e "$stamp [dev]" .venv/.installed; then
    return 0
  fi
  python=$(find_python) || return 2
  echo "+ installing into .venv with $("$python" --version) (once; about two minutes)" >&2
  if has_cuda_torch "$python"; then
    [ -x .venv/bin/python ] || "$python" -m venv --system-site-packages .venv || return 1
  else
    [ -x .venv/bin/python ] || "$python" -m venv .venv || return 1
    # torch first and pinned by the constraints: nothing that follows may replace it
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch || return 1
  fi
  local pins=constraints.txt
  if has_cuda_torch .venv/bin/python; then
    grep -v '^torch==' constraints.txt > .venv/constraints.txt
    .venv/bin/python -c 'import torch; print("torch==" + torch.__version__)' >> .venv/constraints.txt
    pins=.venv/constraints.txt
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c "$pins" -e ".$extras" || return 1
  echo "$stamp $extras" > .venv/.installed
}
