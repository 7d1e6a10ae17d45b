# shellcheck shell=bash
# Functions of the job scripts in this directory; each of them sources this file. docs/cluster.md explains them.
#
# Set before sbatch, which passes the environment on:
#   FIPO_SETUP       file to source in the job: modules, a virtual environment, NCCL_* and other variables
#   FIPO_PYTHON      Python that has fipo_megatron (python3)
#   FIPO_CONTAINER   image for pyxis (srun --container-image); FIPO_MOUNTS is its --container-mounts
#   FIPO_RANKS       ranks on each trainer node (the node's GPUs; 1 without)
#   FIPO_SRUN        further options of every srun, such as --cpu-bind=none
#   FIPO_SCRIPTS     directory of these scripts (examples/slurm below the directory of sbatch)
#   FIPO_PREFLIGHT   off: the nodes are not examined; replace: the job starts again on other nodes than the bad ones, and
#                    does not end
#   FIPO_STARTS      starts of the job without a newly finished step between them, after which it ends (3)

if [[ -n "${FIPO_SETUP:-}" ]]; then
  # shellcheck source=/dev/null
  source "$FIPO_SETUP"
fi
python=${FIPO_PYTHON:-python3}
read -ra run_step <<<"srun ${FIPO_SRUN:-}"
if [[ -n "${FIPO_CONTAINER:-}" ]]; then
  run_step+=("--container-image=$FIPO_CONTAINER" "--container-workdir=$PWD")
  run_step+=("--container-mounts=${FIPO_MOUNTS:-$PWD:$PWD}")
fi
# Of a heterogeneous job, only the steps that name another group run there.
trainer_nodes=${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}
trainer_count=${SLURM_JOB_NUM_NODES_HET_GROUP_0:-$SLURM_JOB_NUM_NODES}
if [[ -n "${SLURM_HET_SIZE:-}" ]]; then run_step+=(--het-group=0); fi
ranks=${FIPO_RANKS:-${SLURM_GPUS_ON_NODE:-1}}
# Without --cpus-per-task, Slurm may bind a task to one core.
cpus=${SLURM_CPUS_ON_NODE:-1}
stopping="" # the signal that asked the job to end
output=""

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

# Runs a command once, on the first trainer node, with all of its cores and GPUs.
once() { "${run_step[@]}" --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task="$cpus" "$@"; }

# Options of a step on the second component of a heterogeneous job.
if [[ -n "${SLURM_HET_SIZE:-}" ]]; then
  rollout_nodes=$SLURM_JOB_NODELIST_HET_GROUP_1
  rollout_count=$SLURM_JOB_NUM_NODES_HET_GROUP_1
  rollout_cpus=${SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1%%[(,]*} # 128(x8): 128 cores on each of 8 nodes
  rollout_step=("${run_step[@]:1}")
  rollout_step=("${rollout_step[@]/--het-group=0/--het-group=1}")
fi

# Waits for a process of this shell, also if a signal interrupts the wait; returns its exit code.
await() {
  while kill -0 "$1" 2>/dev/null; do wait "$1"; done
  wait "$1"
}

# Reads run.output, and with it the whole configuration: a wrong one ends the job here, with exit code 2.
read_output() { # CONFIG [key=value ...]
  if ! output=$(once "$python" -m fipo_megatron.cli config "$@" --value run.output); then
    say "the configuration is not valid"
    exit 2
  fi
  logs=$output/slurm/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  if ! mkdir -p "$logs"; then
    say "ends: $logs cannot be made"
    exit 1
  fi
  say "output in $output, one log per rank in $logs"
}

finished_steps() { if [[ -f $output/metrics.jsonl ]]; then wc -l <"$output/metrics.jsonl"; else echo 0; fi; }

# Prints the earlier starts of this job since which no step was finished for the first time.
starts_in_vain() {
  awk -v job="$SLURM_JOB_ID" -v steps="$(finished_steps)" '$1 == job && $2 >= steps { n++ } END { print n + 0 }' \
    "$output/slurm/starts" 2>/dev/null || echo 0
}

# Counts this start. Slurm itself starts a job again whose node fails, so the limit is checked here, too.
count_start() {
  if (($(starts_in_vain) >= ${FIPO_STARTS:-3})); then
    say "ends: ${FIPO_STARTS:-3} starts without a newly finished step; see $output/slurm"
    exit 1
  fi
  local start
  start="$SLURM_JOB_ID $(finished_steps) $(date '+%F %T') restart ${SLURM_RESTART_COUNT:-0} on $trainer_nodes"
  if ! echo "$start" >>"$output/slurm/starts"; then # a full disk; a start that is not counted would be repeated for ever
    say "ends: $output/slurm/starts cannot be written"
    exit 1
  fi
  rm -f "$output/stop" "$output/outcome.json" # of an earlier start
}

# Ranks find each other at the address of the first node.
set_master() {
  local first
  first=$(scontrol show hostnames "$trainer_nodes" | head -n 1)
  MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  export MASTER_ADDR=${MASTER_ADDR:-$first}
}

# Ends the run after its step. Slurm sends USR1 to this script alone before the time limit (--signal), and at preemption
# with SlurmctldParameters=preempt_send_user_signal. The file has the trainer finish its step and save. TERM reaches all processes of
# a job without this script. INT comes from the user (scancel --batch --signal=INT JOB): nothing is requeued.
stop_run() { # SIGNAL
  if [[ $stopping != INT ]]; then stopping=$1; fi
  say "$1: the run ends after its step"
  if [[ $1 != TERM && -d $output ]]; then touch "$output/stop"; fi
}

catch_signals() {
  trap 'stop_run USR1' USR1
  trap 'stop_run TERM' TERM
  trap 'stop_run INT' INT
}

# Examines the nodes (docs/preflight.md). A bad one ends the job before a rank starts, or is replaced.
examine_nodes() { # CONFIG [key=value ...]
  if [[ ${FIPO_PREFLIGHT:-on} = off || -n $stopping ]]; then return; fi
  set_master
  local bad examine=("$python" -m fipo_megatron.preflight "$@" --exclude-file "$logs/bad-nodes")
  local step=("${run_step[@]}" --nodes="$trainer_count" --ntasks="$trainer_count" --ntasks-per-node=1
    --cpus-per-task="$cpus" --kill-on-bad-exit=0)
  if [[ -n "${SLURM_HET_SIZE:-}" ]]; then # one step over both components
    examine+=(--rollout-nodes "$rollout_count")
    examine+=(: "${rollout_step[@]}" --nodes="$rollout_count" --ntasks="$rollout_count" --ntasks-per-node=1
      --cpus-per-task="$rollout_cpus" --kill-on-bad-exit=0 "${examine[@]}")
  fi
  "${step[@]}" "${examine[@]}" &
  await $!
  code=$?
  if [[ $code = 0 || -n $stopping ]]; then return; fi
  bad=$(cat "$logs/bad-nodes" 2>/dev/null)
  say "the preflight has failed with exit code $code${bad:+; sbatch --exclude=$bad avoids bad nodes}"
  if [[ ${FIPO_PREFLIGHT:-on} = replace && -n $bad ]]; then replace_nodes "$bad"; fi
  exit "$code"
}

node_names() { scontrol show hostnames "$trainer_nodes${rollout_nodes:+,$rollout_nodes}" | sort; }

# Has Slurm start the job again on other nodes, at most FIPO_STARTS times without a newly finished step between. Returns if
# it cannot. Nodes that were excluded before stay so.
replace_nodes() { # BAD, such as n3,n7
  local bad job excluded
  bad=$(tr , '\n' <<<"$1" | sort)
  if [[ $bad = "$(node_names)" ]]; then
    say "all nodes are bad: the fault is most likely that of the job, and no node is replaced"
    return
  fi
  if (($(starts_in_vain) >= ${FIPO_STARTS:-3})); then
    say "ends: ${FIPO_STARTS:-3} starts without a newly finished step; see $output/slurm"
    return
  fi
  trap '' TERM # Slurm sends it to all processes of a job that is requeued
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    say "cannot be requeued; submit it again without bad nodes"
    return
  fi
  for job in "$SLURM_JOB_ID" ${SLURM_JOB_ID_HET_GROUP_1:-}; do
    # While a heterogeneous job runs, Slurm may list the nodes of one component as excluded from the other.
    excluded=$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^( ]*\).*/\1/p' | head -n 1)
    excluded=$(comm -23 <(scontrol show hostnames "$excluded" | sort) <(node_names) | paste -sd,)
    scontrol update JobId="$job" ExcNodeList="${excluded:+$excluded,}$1"
  done
  say "is requeued on other nodes than $1"
  exit "$code"
}

# Runs the trainer on all trainer nodes; sets code to its exit code. A rank that does not end within a minute of the
# first one is killed.
run_trainer() { # CONFIG [key=value ...]
  code=1
  if [[ -n $stopping ]]; then return; fi # before the trainer was started
  set_master
  "${run_step[@]}" --nodes="$trainer_count" --ntasks="$((trainer_count * ranks))" --ntasks-per-node="$ranks" \
    --cpus-per-task="$((cpus / ranks))" --kill-on-bad-exit=0 --wait=60 --output="$logs/rank-%4t.log" \
    "$python" -m fipo_megatron.train "$@" &
  await $!
  code=$?
}

outcome() { sed -n 's/.*"outcome": "\([a-z]*\)".*/\1/p' "$output/outcome.json" 2>/dev/null; }

# Ends the job, or has Slurm start it again; the run then resumes from its newest checkpoint.
finish() {
  local how
  how=$(outcome)
  say "the trainer has ended with exit code $code after $(finished_steps) steps: ${how:-killed}${stopping:+ ($stopping)}"
  if [[ $code != 0 && -f $logs/rank-0000.log ]]; then tail -n 20 "$logs/rank-0000.log"; fi
  if [[ $code = 0 && $how = complete ]]; then exit 0; fi
  if [[ $code = 2 || $code = 3 ]]; then exit "$code"; fi # not valid, or collapsed: another start would not help
  if [[ $stopping = INT && $how = stopped ]]; then exit 0; fi
  # A job that was cancelled, or that Slurm requeues itself, is not running any more.
  if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T | head -n 1) != RUNNING ]]; then exit "$code"; fi
  if [[ $how != stopped && -z $stopping ]] && (($(starts_in_vain) >= ${FIPO_STARTS:-3})); then
    say "ends: ${FIPO_STARTS:-3} starts without a newly finished step; see $logs"
    exit 1
  fi
  say "is requeued and resumes"
  trap 'exit 0' TERM # Slurm ends this script
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    say "cannot be requeued; submit it again to resume"
    exit 1
  fi
  sleep 60 &
  wait
}
