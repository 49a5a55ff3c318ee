# Sourced by scripts/npulab and scripts/test: `ensure_venv EXTRA` makes .venv in the project folder hold
# npulab[EXTRA]. Does nothing when that is done already; a run that failed half-way is finished by the next.

PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$PROJECT/.venv"

say() { printf '%s\n' "$*" >&2; }

# The first Python 3.11 or later on the path; the variable PYTHON may name another.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    say "npulab needs Python 3.11 or later, and found none."
    say "  got     $("${PYTHON:-python3}" --version 2>&1 || true)"
    say "  try     install Python 3.11 or later, or name one: PYTHON=/path/to/python3 $0"
    return 1
}

# What an installation depends on: the project's declarations and C sources, its place, and what was asked for.
wanted() {
    local sources
    sources="$(cat "$PROJECT/pyproject.toml" "$PROJECT/setup.py" "$PROJECT"/src/npulab/*.c 2>/dev/null | cksum || true)"
    printf '%s %s %s\n' "$sources" "$PROJECT" "$1"
}

is_ready() {
    local stamp="$VENV/npulab-$1.stamp"
    [ -x "$VENV/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted "$1")" ]
}

install_extra() {
    local extra="$1" python
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)"
        say "npulab: making $VENV with $("$python" --version)"
        if ! "$python" -m venv --clear "$VENV" >&2; then
            say "npulab: $python could not make a virtual environment."
            say "  try     install the venv module of your Python (Debian and Ubuntu: python3-venv)"
            return 1
        fi
    fi
    say "npulab: installing npulab[$extra] into $VENV (first time, or its declarations changed)"
    if ! (cd "$PROJECT" && "$VENV/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
        --editable ".[$extra]" </dev/null >&2); then
        say "npulab: the installation failed; its reason stands above."
        say "  try     the same command again once the cause is gone: it goes on from here"
        return 1
    fi
    wanted "$extra" >"$VENV/npulab-$extra.stamp"
}

ensure_venv() {
    local extra="$1"
    if is_ready "$extra"; then return 0; fi
    (
        # One installation at a time, where the system has flock.
        if command -v flock >/dev/null 2>&1; then flock 9; fi
        if ! is_ready "$extra"; then install_extra "$extra"; fi
    ) 9<"$PROJECT"
}
