#!/bin/sh
# The committed package and notebooks are what nbdev makes of them: nbdev_export and nbdev_clean change nothing.
# Whatever they do change is left in place, ready to be looked at and committed.
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
state() { git status --porcelain --untracked-files=all; git diff | cksum; }
before=$(state)
for command in nbdev_export nbdev_clean; do
    $command
    if [ "$(state)" != "$before" ]; then
        echo "$command changed files: commit what it made"
        git status --porcelain --untracked-files=all
        git --no-pager diff --stat
        exit 1
    fi
    echo "$command changes nothing"
done
