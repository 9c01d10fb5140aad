# shellcheck shell=sh
# Sourced by scripts/test and scripts/bench: $VENV, the developers' environment, made again when pyproject.toml changes.

VENV=$CHECKOUT/.venv
stamp=$(source_hash pyproject.toml)
if [ "$(cat "$VENV/.complete" 2>/dev/null)" != "$stamp" ]; then
    step "making $VENV"
    rm -rf "$VENV"
    quietly "no virtual environment at $VENV" "is python3-venv installed?" "$PYTHON" -m venv "$VENV"
    quietly "the tests' packages can't be installed" "is the package index reachable? see pip's lines above" \
        "$VENV/bin/python" -m pip install -q --disable-pip-version-check -e "$CHECKOUT[test]"
    quietly "byte-compiling failed" "see the lines above" "$VENV/bin/python" -m compileall -q "$VENV/lib"
    echo "$stamp" >"$VENV/.complete"
fi
