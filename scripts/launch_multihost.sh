#!/usr/bin/env bash
# Runs one rdopt command in several processes that train as one: each gets a share of every batch, process 0 reads the
# model and the text and writes the run. A run that was killed goes on when the same command is given again.
#
# usage: launch_multihost.sh [--dry-run] MODE ... -- COMMAND ...
#
#   local N               N processes on this machine
#   ssh HOST,HOST,...     one process a host, over ssh, in this folder's path; the first host is process 0
#   slurm [SRUN OPTION]   one process a task of srun; place and number come from SLURM
#   tpu NAME [OPTION]     one process a worker of a TPU pod slice, in the login folder
#
# --dry-run prints the commands instead. PORT (default 29500) is process 0's, RDOPT the program (default rdopt).
#
# Examples:
#   launch_multihost.sh local 2 -- train demo --out runs/a
#   launch_multihost.sh ssh gpu1,gpu2 -- train demo --out runs/a --train.batch_sequences 16
#   launch_multihost.sh slurm --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 -- train demo --out runs/a
#   RDOPT=.venv/bin/rdopt launch_multihost.sh tpu pod --zone us-central2-b -- train demo --out runs/a
#
# Processes share no files: only process 0 needs the model, the text and the run's folder. They have to reach its PORT.
set -euo pipefail

port=${PORT:-29500}
rdopt=${RDOPT:-rdopt}
dry=no

usage() {
  sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p;}' "$0" >&2
  exit 2
}

quoted() {
  printf '%q ' "$@"
}

# Starts a command beside the others, or prints it.
start() {
  if [[ $dry == yes ]]; then
    quoted "$@"
    echo
  else
    "$@" &
  fi
}

# Waits for all; the first that fails ends the others, which would wait for it.
finish() {
  local status=0 running
  running=$(jobs -p)
  trap 'kill -INT $(jobs -p) 2>/dev/null || true' INT TERM
  while [[ -n $(jobs -p) ]]; do
    wait -n || status=$?
    if ((status != 0)); then
      sleep 2
      # shellcheck disable=SC2086 # one word a process
      kill $running 2>/dev/null || true
      break
    fi
  done
  wait || true
  exit "$status"
}

[[ ${1:-} == --dry-run ]] && dry=yes && shift
mode=${1:-}
[[ -n $mode ]] && shift

before=()
while (($#)) && [[ $1 != -- ]]; do
  before+=("$1")
  shift
done
(($# > 1)) || usage
shift

case $mode in
  local)
    n=${before[0]:?local needs a number of processes}
    for ((i = 0; i < n; i++)); do
      start "$rdopt" "$@" --coordinator "127.0.0.1:$port" --processes "$n" --process "$i"
    done
    ;;
  ssh)
    IFS=, read -r -a hosts <<<"${before[0]:?ssh needs hosts}"
    for i in "${!hosts[@]}"; do
      place=(--coordinator "${hosts[0]}:$port" --processes "${#hosts[@]}" --process "$i")
      # -tt: the remote process ends with this one.
      start ssh -tt "${hosts[i]}" "cd $(quoted "$PWD") && $(quoted "$rdopt" "$@" "${place[@]}")"
    done
    ;;
  slurm)
    start srun --kill-on-bad-exit=1 ${before[@]+"${before[@]}"} "$rdopt" "$@" --coordinator auto
    ;;
  tpu)
    (("${#before[@]}")) || usage
    start gcloud compute tpus tpu-vm ssh "${before[@]}" --worker=all --command="$(quoted "$rdopt" "$@" --coordinator auto)"
    ;;
  *) usage ;;
esac
[[ $dry == yes ]] || finish
