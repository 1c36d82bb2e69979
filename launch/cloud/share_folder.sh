#!/usr/bin/env bash
# One folder for all nodes, for machines without a file system that they share: on the first node's
# disk, by NFS on the others. Runs are written there before they are uploaded; docs/cloud.md.
#
#   bash launch/cloud/share_folder.sh FOLDER NODE_RANK "<addresses of all nodes, a line each>"
#
# Ubuntu and Debian. May be run again. Whoever reaches the nodes' port 2049 by one of these addresses
# can read the folder: it is for the private network of one cluster.
set -euo pipefail

readonly ATTEMPTS=60
folder=$1 rank=$2
mapfile -t nodes <<<"$3"

as_root() { if [[ $(id -u) == 0 ]]; then "$@"; else sudo "$@"; fi; }

install_package() {
    dpkg -s "$1" >/dev/null 2>&1 && return
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$1" >/dev/null
}

mkdir -p "$folder"
if [[ $rank == 0 ]]; then
    install_package nfs-kernel-server
    for node in "${nodes[@]:1}"; do
        echo "sharing $folder with $node"
        as_root exportfs -o rw,no_subtree_check "$node:$folder"
    done
elif ! mountpoint -q "$folder"; then
    install_package nfs-common
    # actimeo: how long, in seconds, a node may believe what it has seen of a file or a folder
    for ((attempt = 1; ; attempt++)); do
        as_root mount -t nfs4 -o actimeo=1 "${nodes[0]}:$folder" "$folder" && break
        if ((attempt == ATTEMPTS)); then
            echo "error: $folder of ${nodes[0]} -> cannot be mounted -> look at that node" >&2
            exit 1
        fi
        sleep 5
    done
    echo "using $folder of ${nodes[0]}"
fi
