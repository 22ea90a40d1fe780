#!/usr/bin/env bash
# Registers the work pool, the deployments and the automation on a Prefect server (PREFECT_API_URL). Safe to repeat.
# If WSI_SCHEDULER is set, it replaces `local` as the scheduler of all deployments that segment slides.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

sed "s|scheduler: local|scheduler: ${WSI_SCHEDULER:-local}|" prefect.yaml > "$scratch/prefect.yaml"
# Keep what exists: somebody may have paused the pool or changed the automation.
prefect --no-prompt work-pool inspect slides >/dev/null 2>&1 ||
  prefect --no-prompt work-pool create slides --type process
prefect --no-prompt deploy --all --prefect-file "$scratch/prefect.yaml"
prefect --no-prompt automation inspect crash-silent-flow-runs >/dev/null 2>&1 ||
  prefect --no-prompt automation create --from-file settings/automations.yaml
