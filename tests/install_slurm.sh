#!/bin/sh
# SLURM and munge for tests marked slurm. Where this machine cannot have them (no root, no
# apt), it says why, and the tests are skipped with the same reason.
command -v slurmctld >/dev/null && command -v munged >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "no SLURM here: installing it needs root and apt-get" >&2
  exit 0
fi
# Without a network it shall say so soon.
wait="-o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o Acquire::Retries=1"
apt-get $wait update -qq &&
  DEBIAN_FRONTEND=noninteractive apt-get $wait install -y -qq slurm-wlm munge ||
  echo "no SLURM here: apt-get could not install slurm-wlm and munge" >&2
exit 0
