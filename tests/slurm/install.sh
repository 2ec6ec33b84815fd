#!/usr/bin/env bash
# Installs Slurm's daemons and what builds the container stub, for the tests of this folder (Debian, Ubuntu; root).
# Does nothing where they are. Where it cannot (no root, no apt) it says what to do and succeeds: the tests then skip.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"

complete() {
    local program
    for program in munged slurmctld slurmd sbatch srun squeue scancel scontrol sinfo gcc; do
        command -v "$program" >/dev/null || return 1
    done
    [[ -e /usr/include/slurm/spank.h ]]
}

packages=(slurmctld slurmd slurm-client munge libslurm-dev)
command -v gcc >/dev/null || packages+=(gcc libc6-dev)

if complete; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "install.sh: no apt-get here; install Slurm (munge, slurmctld, slurmd, its commands and headers) by hand, or the Slurm tests skip" >&2
    exit 0
fi
if [[ $(id -u) != 0 ]]; then
    echo "install.sh: not root; run 'sudo apt-get install ${packages[*]}', or the Slurm tests skip" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
if ! complete; then
    echo "install.sh: ${packages[*]} are installed, yet a daemon, command or header of Slurm is still missing" >&2
    exit 1
fi
