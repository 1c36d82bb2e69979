#!/usr/bin/env bash
# Makes a bare Ubuntu or Debian machine train, and keeps it training; docs/cloud.md.
#
#   bash launch/cloud/start_instance.sh [--cpu] [--only-install] experiment=gpt_124m ... [key=value]
#
# Run it from a clone, as yourself (it asks sudo for what needs it) or as root. Each step says what it
# does and is left out where it is done already, so that the same command may be given again: after a
# failure, an update of the clone, or a reboot that a new driver asks for. Other settings stop the
# run, which saves, and start the new one.
#
#   --cpu           train without a GPU: none is looked for
#   --only-install  stop before training; what the container and SkyPilot's files need
#
# Keys (AWS_ACCESS_KEY_ID=..., WANDB_API_KEY=...) go into ~/.config/trainyard.env, a line each.
set -euo pipefail

readonly MOUNT=/mnt/trainyard
# The driver that CUDA 13.0 asks for, which PyPI's wheels of torch 2.13 bring
readonly DRIVER=580
# Where the system has no Python that is new enough: uv knows the sum of each Python that it fetches
readonly OWN_UV=0.13.9 OWN_PYTHON=3.12.16
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
readonly project python="$project/.venv/bin/python" run_script="$project/.venv/run.sh"

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
as_root() { if [[ $(id -u) == 0 ]]; then "$@"; else sudo "$@"; fi; }
has() { command -v "$1" >/dev/null 2>&1; }

install_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
    done
    [[ ${#missing[@]} == 0 ]] && return
    say "installing ${missing[*]}"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

check_system() {
    has apt-get || fail "this system has no apt-get -> the script is for Ubuntu and Debian -> " \
        "use launch/cloud/Containerfile"
    # g++: DeepSpeed and torch.compile build operators; python3-venv: Ubuntu's python3 has none
    install_packages python3 python3-dev python3-venv g++ ca-certificates
}

check_gpu() {
    if ! has nvidia-smi || ! nvidia-smi >/dev/null 2>&1; then install_driver; fi
    check_driver
    say "GPUs: $(nvidia-smi --query-gpu=name --format=csv,noheader | sort | uniq -c | xargs)"
}

# Whoever has put a torch for another CUDA into constraints.txt knows which driver it needs.
check_driver() {
    local driver
    read -r driver < <(nvidia-smi --query-gpu=driver_version --format=csv,noheader)
    if ((${driver%%.*} >= DRIVER)) || grep -q '^torch==.*+cu' "$project/constraints.txt"; then
        return
    fi
    fail "NVIDIA's driver is $driver -> torch's CUDA 13.0 needs $DRIVER or later -> an image with" \
        "one, or a torch for an older CUDA (docs/cloud.md, \"An older driver\")"
}

install_driver() {
    install_packages pciutils
    lspci | grep -qi nvidia || fail "no NVIDIA GPU on the bus -> nothing to train on -> another " \
        "kind of machine, or --cpu"
    apt-cache show ubuntu-drivers-common >/dev/null 2>&1 || fail \
        "the GPU has no driver -> only Ubuntu's is installed here -> install NVIDIA's"
    install_packages ubuntu-drivers-common
    say "installing NVIDIA's driver, of the server kind"
    as_root ubuntu-drivers install --gpgpu
    as_root modprobe nvidia || true
    nvidia-smi >/dev/null 2>&1 || fail "the new driver is not loaded -> it needs a reboot -> " \
        "sudo reboot, then the same command"
}

# A disk of the machine itself, empty and unused, as clouds name theirs; never one with anything on it.
find_local_disk() {
    local disk
    for disk in $(lsblk -dnpo NAME,TYPE | awk '$2 == "disk" {print $1}'); do
        [[ $(lsblk -dno MODEL "$disk") =~ (Instance\ Storage|nvme_card|Direct\ Disk) ]] || continue
        [[ $(lsblk -no NAME "$disk" | wc -l) == 1 ]] || continue # it has partitions
        [[ -z $(as_root blkid -p "$disk" || true) && -z $(lsblk -dno MOUNTPOINT "$disk") ]] || continue
        echo "$disk"
        return
    done
}

mount_local_disk() {
    local disk
    if mountpoint -q "$MOUNT"; then
        say "$MOUNT is mounted already"
        return
    fi
    disk=$(find_local_disk)
    if [[ -z $disk ]]; then
        say "no empty local NVMe disk: prepared data and caches go to $project/data"
        return
    fi
    say "making a file system on $disk, mounted at $MOUNT, for prepared data and caches"
    as_root mkfs.ext4 -q -L trainyard "$disk"
    as_root mkdir -p "$MOUNT"
    # nofail: after a stop (not a reboot) such a disk comes back empty, or is another one
    grep -q 'LABEL=trainyard' /etc/fstab ||
        echo "LABEL=trainyard $MOUNT ext4 nofail,discard 0 2" | as_root tee -a /etc/fstab >/dev/null
    as_root mount "$MOUNT"
    as_root chown "$(id -u):$(id -g)" "$MOUNT"
}

# The newest that has what an environment and the operators need: ensurepip and Python.h.
find_python() {
    local name check='import ensurepip, os, sys, sysconfig
header = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(sys.version_info < (3, 11) or not os.path.exists(header))'
    for name in python3.13 python3.12 python3.11 python3; do
        if has "$name" && "$name" -c "$check" 2>/dev/null; then
            echo "$name"
            return
        fi
    done
}

make_environment() {
    local found uv="$project/.venv/uv/bin/uv"
    found=$(find_python)
    if [[ -z $found ]]; then
        say "$(python3 --version) is older than 3.11: fetching $OWN_PYTHON by uv, for .venv alone"
        export UV_PYTHON_INSTALL_DIR="$project/.venv/python"
        python3 -m venv "$project/.venv/uv"
        "$project/.venv/uv/bin/pip" install --quiet --no-cache-dir "uv==$OWN_UV"
        "$uv" python install --no-bin "$OWN_PYTHON"
        found=$("$uv" python find --system --no-project --managed-python "$OWN_PYTHON")
    fi
    "$found" -m venv "$project/.venv"
}

install_project() {
    local stamp="$project/.venv/instance" wanted
    wanted=$(cat "$project/pyproject.toml" "$project/constraints.txt" | sha256sum)
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        say "the project is installed in $project/.venv"
        return
    fi
    say "installing the project and its packages in $project/.venv (some GB, some minutes)"
    [[ -x $python ]] || make_environment
    "$python" -m pip install --quiet --no-cache-dir -c "$project/constraints.txt" \
        -e "${project}[s3,gcs]"
    echo "$wanted" >"$stamp"
}

# What systemd or tmux runs. Quoted for bash, so that overrides may hold anything.
write_run_script() {
    local overrides=("$@")
    mountpoint -q "$MOUNT" && overrides=("data_dir=$MOUNT/data" "${overrides[@]}")
    mkdir -p "$HOME/.config"
    (umask 077 && touch "$HOME/.config/trainyard.env")
    {
        echo "set -a; source $(printf %q "$HOME/.config/trainyard.env"); set +a"
        echo "cd $(printf %q "$project")"
        echo "exec $(printf '%q ' "$python" -m launch.train "${overrides[@]}")"
    } >"$run_script.new"
}

# 75: stopped on request and saved. 1: somebody has to mend something. Killed: started again, but
# not for ever, since each start may run out of memory. WorkingDirectory: spaces need no quotes
# there, only % is systemd's, and the unit waits for its mount.
write_unit() {
    cat <<EOF
[Unit]
Description=Trainyard
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=3600
StartLimitBurst=5

[Service]
User=$(id -un)
WorkingDirectory=${project//%/%%}
ExecStart=/bin/bash .venv/run.sh
SuccessExitStatus=75
Restart=on-abnormal
RestartSec=10
KillMode=mixed
TimeoutStopSec=900

[Install]
WantedBy=multi-user.target
EOF
}

start_by_systemd() {
    local unit=/etc/systemd/system/trainyard.service wanted
    wanted=$(write_unit)
    if [[ -f $unit && $(<"$unit") == "$wanted" ]] && cmp -s "$run_script.new" "$run_script" &&
        systemctl is-active --quiet trainyard; then
        say "trainyard.service trains already"
        return
    fi
    say "starting trainyard.service: it outlives this session, and starts again after a reboot"
    mv "$run_script.new" "$run_script"
    echo "$wanted" | as_root tee "$unit" >/dev/null
    as_root systemctl daemon-reload
    as_root systemctl enable --quiet trainyard
    # what was started before does not count: neither a run that was given up nor other overrides
    as_root systemctl reset-failed trainyard 2>/dev/null || true
    as_root systemctl restart trainyard
    echo "watch: journalctl -fu trainyard    stop, saved: sudo systemctl disable --now trainyard"
}

start_by_tmux() {
    install_packages tmux
    if tmux has-session -t trainyard 2>/dev/null; then
        if cmp -s "$run_script.new" "$run_script"; then
            say "tmux session trainyard trains already"
            return
        fi
        say "stopping the run in tmux session trainyard, which saves"
        tmux send-keys -t trainyard C-c
        while tmux has-session -t trainyard 2>/dev/null; do sleep 1; done
    fi
    say "starting tmux session trainyard: it outlives this session, but no reboot (no systemd here)"
    mv "$run_script.new" "$run_script"
    tmux new-session -d -s trainyard "bash $(printf %q "$run_script")" \; \
        pipe-pane -t trainyard "cat >>$(printf %q "$HOME/trainyard.log")"
    echo "watch: tmux attach -t trainyard    stop, saved: Ctrl-C there    log: ~/trainyard.log"
}

main() {
    local needs_gpu=yes trains=yes
    while [[ ${1-} == --* ]]; do
        case $1 in
            --cpu) needs_gpu=no ;;
            --only-install) trains=no ;;
            *) fail "$1 -> no such option -> --cpu, --only-install, then overrides" ;;
        esac
        shift
    done
    [[ $trains == no || $# -gt 0 ]] || fail "nothing to train -> give overrides, experiment=... say"
    cd "$project"
    check_system
    [[ $needs_gpu == no ]] || check_gpu
    mount_local_disk
    install_project
    [[ $trains == yes ]] || return 0
    write_run_script "$@"
    if [[ -d /run/systemd/system ]]; then start_by_systemd; else start_by_tmux; fi
}

main "$@"
