#!/usr/bin/env bash
# Registers the work pool, the deployments and the automation on a Prefect server (PREFECT_API_URL), and keeps those that
# exist: somebody may have paused or changed them. `--replace` registers all deployments again, as they are in prefect.yaml.
# WSI_SCHEDULER is the scheduler of the deployments that segment slides (default: local).
set -euo pipefail
case $#:${1-} in
  0: | 1:--replace) ;;
  *) echo "usage: $0 [--replace]" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")"
export WSI_SCHEDULER=${WSI_SCHEDULER:-local}

# Whether the server has this. Any other error ends the script, because what cannot be inspected may exist.
exists() {
  local message
  if message=$(PREFECT_CLI_WRAP_LINES=false prefect --no-prompt "$1" inspect "$2" 2>&1); then return 0; fi
  case $message in *"' not found"*) return 1 ;; esac
  printf '%s\n' "$message" >&2
  exit 1
}

exists work-pool slides ||
  prefect --no-prompt work-pool create slides --type process
chosen=()
if [ "${1-}" = --replace ]; then
  chosen=(--all)
else
  for deployment in segment-batch/nightly segment-batch/on-demand segment-slide/one-slide train/training; do
    exists deployment "$deployment" || chosen+=(--name "${deployment#*/}")
  done
fi
[ ${#chosen[@]} = 0 ] || prefect --no-prompt deploy "${chosen[@]}"
exists automation crash-silent-flow-runs ||
  prefect --no-prompt automation create --from-file settings/automations.yaml
