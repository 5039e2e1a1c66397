#!/bin/sh
# A machine of the failover test: waits for its network, then runs etcd and Patroni until it is killed.
#
#   proof/patroni/machine.sh FOLDER NAME ADDRESS MEMBERS STATE PATRONI ETCD
#
# Runs in namespaces of its own, whose processes all end with the first one.
set -eu
folder=$1 name=$2 address=$3 members=$4 state=$5 patroni=$6 etcd=$7
cd "$folder"
ip link set lo up
until ip -4 addr show dev eth0 2>/dev/null | grep -q "inet $address/"; do
    sleep 0.05
done
# What the dead machine of this name has left would keep Postgres from starting.
rm -f data/postmaster.pid

as_postgres() {
    setpriv --reuid postgres --regid postgres --init-groups -- env -i PATH="$PATH" HOME="$folder" LC_ALL=C "$@"
}

as_postgres "$etcd" --name "$name" --data-dir "$folder/etcd" \
    --listen-client-urls "http://$address:2379" --advertise-client-urls "http://$address:2379" \
    --listen-peer-urls "http://$address:2380" --initial-advertise-peer-urls "http://$address:2380" \
    --initial-cluster "$members" --initial-cluster-state "$state" \
    >>"$folder/etcd.log" 2>&1 &
as_postgres "$patroni" "$folder/patroni.yml" >>"$folder/patroni.log" 2>&1 &
wait
