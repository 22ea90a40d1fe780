#!/usr/bin/env bash
# Registers the work pool, the deployments and the automation on a Prefect server (PREFECT_API_URL), and keeps those that
# exist: somebody may have paused or changed them. `--replace` registers all deployments again, as they are in prefect.yaml.
# WSI_SCHEDULER is the scheduler of the deployments that segment slides (default: local).
set -euo pipefail
case ${1-} in
  "" | --replace) ;;
  *) echo "usage: $0 [--replace]" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")"
export WSI_SCHEDULER=${WSI_SCHEDULER:-local}

prefect --no-prompt work-pool inspect slides >/dev/null 2>&1 ||
  prefect --no-prompt work-pool create slides --type process
chosen=()
if [ "${1-}" = --replace ]; then
  chosen=(--all)
else
  for deployment in segment-batch/nightly segment-batch/on-demand segment-slide/one-slide train/training; do
    prefect --no-prompt deployment inspect "$deployment" >/dev/null 2>&1 || chosen+=(--name "${deployment#*/}")
  done
fi
[ ${#chosen[@]} = 0 ] || prefect --no-prompt deploy "${chosen[@]}"
prefect --no-prompt automation inspect crash-silent-flow-runs >/dev/null 2>&1 ||
  prefect --no-prompt automation create --from-file settings/automations.yaml
