#!/usr/bin/env bash
# A grid on one TPU slice, with gcloud alone. Spot machines are taken away; `up` makes a new slice and goes on.
#
#   export POD=study ZONE=us-east5-b TYPE=v6e-16 BUCKET=gs://NAME/study GRID=configs/grids/size_by_tokens.py
#   experiments/pod.sh up        create, install, run, again after each preemption; at the end fetch and delete
#
#   experiments/pod.sh create    ask for the slice and wait until it is there
#   experiments/pod.sh install   send this repository to all its hosts and prepare them
#   experiments/pod.sh run       do what is missing of the grid, on all hosts together
#   experiments/pod.sh fetch     copy rows and progress from the bucket to $WORKDIR; show the grid
#   experiments/pod.sh delete    give the slice back (what it costs ends here)
#
# Other settings: WORKDIR (default workdirs/$POD), CAPACITY (spot or on-demand), PROJECT, IMAGE (of the hosts),
# SHARE (of several slices, the part of the grid that is for this one: 0/4, 1/4, ...; each slice has a POD of its own).
# Rows and checkpoints are in $BUCKET, so nothing is lost with a machine. Run it from the repository.
set -euo pipefail

say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

refuse() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

settings() {
    for name in POD ZONE TYPE BUCKET GRID; do
        [ -n "${!name:-}" ] || refuse "$name is not set; the head of $0 has an example"
    done
    command -v gcloud >/dev/null || refuse "gcloud is not installed (cloud.google.com/sdk)"
    [[ $BUCKET =~ ^gs://[^/]+/[^/].*$ ]] || refuse "BUCKET=$BUCKET: expected a folder of a bucket, as in gs://NAME/study"
    [ -f "${GRID%%:*}" ] || refuse "GRID=$GRID: no such file; run this from the repository"
    [[ ${GRID%%:*} != /* ]] || refuse "GRID=$GRID: write it relative to the repository, which is what is sent"
    WORKDIR=${WORKDIR:-workdirs/$POD}
    SHARE=${SHARE:-all}
    [[ $SHARE =~ ^(all|[0-9]+/[0-9]+)$ ]] || refuse "SHARE=$SHARE: expected I/N, as in 0/4"
    case ${CAPACITY:=spot} in
        spot | on-demand) ;;
        *) refuse "CAPACITY=$CAPACITY: spot or on-demand" ;;
    esac
    case $TYPE in
        v4-*) IMAGE=${IMAGE:-tpu-ubuntu2204-base} ;;
        v5litepod-*) IMAGE=${IMAGE:-v2-alpha-tpuv5-lite} ;;
        v5p-*) IMAGE=${IMAGE:-v2-alpha-tpuv5} ;;
        v6e-*) IMAGE=${IMAGE:-v2-alpha-tpuv6e} ;;
        *) refuse "TYPE=$TYPE: one of v4-N, v5litepod-N, v5p-N, v6e-N" ;;
    esac
    WHERE=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
    BUCKET_NAME=${BUCKET#gs://}
    FOLDER=${BUCKET_NAME#*/}
    FOLDER=${FOLDER%/}
    BUCKET_NAME=${BUCKET_NAME%%/*}
}

queued() { gcloud compute tpus queued-resources "$@" "${WHERE[@]}"; }

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; MISSING where there is none. A failed question is asked again.
state() {
    local said
    for _ in 1 2 3; do
        if said=$(queued describe "$POD" --format 'value(state.state)' 2>&1); then
            echo "$said"
            return
        fi
        [[ $said != *NOT_FOUND* && $said != *"not found"* ]] || { echo MISSING && return; }
        sleep "${POLL_SECS:-30}"
    done
    refuse "gcloud does not answer: ${said##*$'\n'}"
}

create() {
    local now failures=0
    while true; do
        now=$(state) || exit 2
        case $now in
            ACTIVE) return ;;
            MISSING)
                say "asking for $TYPE in $ZONE ($CAPACITY)"
                local spot=()
                [ "$CAPACITY" = on-demand ] || spot=(--spot)
                queued create "$POD" --node-id "$POD" --accelerator-type "$TYPE" --runtime-version "$IMAGE" \
                    ${spot[@]+"${spot[@]}"} --quiet
                ;;
            SUSPENDED | SUSPENDING | FAILED)
                say "the slice was taken away or could not be made ($now)"
                [ "$now" != FAILED ] || failures=$((failures + 1))
                delete || sleep "${POLL_SECS:-30}"
                [ "$failures" -lt 3 ] || refuse "$TYPE in $ZONE could not be made three times; try another zone"
                ;;
            *)
                say "waiting for $TYPE: $now"
                sleep "${POLL_SECS:-30}"
                ;;
        esac
    done
}

on_all_hosts() { gcloud compute tpus tpu-vm ssh "$POD" "${WHERE[@]}" --worker=all --command "$1" --quiet; }

install() {
    local packed
    packed=$(mktemp -d)
    say "sending the repository to all hosts, preparing them"
    local -r skip=(--exclude ./.git --exclude ./.venv --exclude ./.cache --exclude ./workdirs --exclude __pycache__)
    local code=0
    tar --create --gzip --file "$packed/vlm_jax.tgz" "${skip[@]}" . &&
        gcloud compute tpus tpu-vm scp "$packed/vlm_jax.tgz" "$POD:" "${WHERE[@]}" --worker=all --quiet || code=$?
    rm -r "$packed"
    [ "$code" = 0 ] || return "$code"
    on_all_hosts "mkdir -p vlm_jax && tar xzf vlm_jax.tgz -C vlm_jax && cd vlm_jax && \
bash experiments/launching/host_setup.sh $(printf %q "$BUCKET_NAME")"
}

run() {
    local words command=.venv/bin/python
    printf -v words '%q ' -m experiments.launch --grid "$GRID" --workdir "bucket/$FOLDER" --index "$SHARE" --processes auto
    say "running the grid; it goes on if this connection ends, and this command comes back to it"
    # What an earlier connection started is waited for, then what is still missing is done.
    on_all_hosts "cd vlm_jax && ln -sfn ~/bucket bucket
old=\$(pgrep -f '^$command -m experiments.launch .*--index $SHARE' | head -n 1)
[ -z \"\$old\" ] || tail -n +1 -f --pid=\$old ~/launch.log
: >~/launch.log
nohup $command $words </dev/null >>~/launch.log 2>&1 & new=\$!
tail -n +1 -f --pid=\$new ~/launch.log
wait \$new"
}

fetch() {
    mkdir -p "$WORKDIR/cells"
    gcloud storage rsync --recursive --exclude='.*/(checkpoints|tensorboard)/.*|.*\.partial-.*|.*/lock$' \
        "${BUCKET%/}/cells" "$WORKDIR/cells"
    if [ -x .venv/bin/python ]; then
        .venv/bin/python -m experiments.launch --grid "$GRID" --workdir "$WORKDIR" --status
    else
        say "the rows are in $WORKDIR/cells/*/row.json; experiments.launch --status gathers them"
    fi
}

delete() {
    say "deleting $POD"
    queued delete "$POD" --force --quiet
}

# A grid that the slice cannot run is refused before it is paid for, where the package is installed here.
check() {
    [ ! -x .venv/bin/python ] || .venv/bin/python -m experiments.launch --grid "$GRID" --workdir "$WORKDIR" --dry-run \
        --accelerator "$TYPE" || exit 2
}

up() {
    check
    local tries=0 code=1 since=$SECONDS
    local -r patience=${PATIENCE_SECS:-$((10 * ${POLL_SECS:-30}))}
    # Begun anew as often as the slice is taken away. Where it is there and the grid still does not end well: three times
    # at least and for minutes, because gcloud may call a slice ACTIVE that is gone already.
    while [ "$tries" -lt 3 ] || [ $((SECONDS - since)) -lt "$patience" ]; do
        create
        if install && run; then
            code=0
            break
        fi
        sleep "${POLL_SECS:-30}"
        if [ "$(state)" = ACTIVE ]; then
            [ "$tries" -gt 0 ] || since=$SECONDS
            tries=$((tries + 1))
            say "a cell failed, or the connection broke: $tries times"
        else
            tries=0
            say "the slice was taken away; a new one goes on from the checkpoints"
        fi
    done
    fetch || say "fetching failed; the rows are in $BUCKET"
    delete
    return "$code"
}

case ${1:-} in
    up | create | install | run | fetch | delete)
        settings
        "$1"
        ;;
    *)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
        [ "${1:-}" = --help ] || refuse "commands: up create install run fetch delete"
        ;;
esac
