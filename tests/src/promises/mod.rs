//! The promises, one file each.

use crate::promise::Promise;

pub mod agents_disks;
pub mod agents_in_lab;
pub mod agents_keep;
pub mod backup_migrates;
pub mod bad_input;
pub mod chaos;
pub mod chaos_in_lab;
pub mod checkpoint_latency;
pub mod checkpoint_replicates;
pub mod clock_keeps;
pub mod commit_latency;
pub mod confined;
pub mod console;
pub mod demo_loses_nothing;
pub mod demo_without_root;
pub mod disk_joins;
pub mod disk_keeps_writes;
pub mod divergence_caught;
pub mod divergence_named;
pub mod docs_commands;
pub mod etcd_arbiter;
pub mod etcd_tls;
pub mod failover_fast;
pub mod figures_quoted;
pub mod host_drained;
pub mod hostile_guest;
pub mod hostile_network;
pub mod lab_hosts;
pub mod lag_bounded;
pub mod leaves_nothing;
pub mod linearizable;
pub mod linux_busy;
pub mod linux_busy_replay;
pub mod linux_debugged;
pub mod linux_disk;
pub mod linux_pair;
pub mod linux_replays;
pub mod linux_side_by_side;
pub mod live_join;
pub mod monitored;
pub mod newcomer;
pub mod newcomer_in_lab;
pub mod no_false_failover;
pub mod offline_replay;
pub mod operator_view;
pub mod output_rule;
pub mod output_unread;
pub mod packaged;
pub mod preempts;
pub mod prepare_exact;
pub mod protocol_modelled;
pub mod protocol_simulated;
pub mod rdma_copy;
pub mod rdma_pair;
pub mod rdma_ring;
pub mod redis_clients;
pub mod replay_exact;
pub mod replay_in_lab;
pub mod reprotects_large;
pub mod resets;
pub mod rolling_upgrade;
pub mod shared_disk;
pub mod shared_disk_reserved;
pub mod side_by_side;
pub mod slurm_in_lab;
pub mod slurm_job;
pub mod switch_over;
pub mod zombie;

/// All of them, in the order in which `scripts/prove` lists them.
pub const ALL: &[Promise] = &[
    demo_loses_nothing::PROMISE,
    demo_without_root::PROMISE,
    replay_exact::PROMISE,
    preempts::PROMISE,
    clock_keeps::PROMISE,
    checkpoint_replicates::PROMISE,
    checkpoint_latency::PROMISE,
    divergence_named::PROMISE,
    divergence_caught::PROMISE,
    output_rule::PROMISE,
    output_unread::PROMISE,
    zombie::PROMISE,
    failover_fast::PROMISE,
    protocol_simulated::PROMISE,
    protocol_modelled::PROMISE,
    no_false_failover::PROMISE,
    etcd_arbiter::PROMISE,
    etcd_tls::PROMISE,
    agents_keep::PROMISE,
    agents_disks::PROMISE,
    host_drained::PROMISE,
    slurm_job::PROMISE,
    redis_clients::PROMISE,
    commit_latency::PROMISE,
    side_by_side::PROMISE,
    figures_quoted::PROMISE,
    docs_commands::PROMISE,
    bad_input::PROMISE,
    hostile_network::PROMISE,
    hostile_guest::PROMISE,
    confined::PROMISE,
    live_join::PROMISE,
    disk_keeps_writes::PROMISE,
    offline_replay::PROMISE,
    disk_joins::PROMISE,
    shared_disk::PROMISE,
    shared_disk_reserved::PROMISE,
    operator_view::PROMISE,
    monitored::PROMISE,
    console::PROMISE,
    resets::PROMISE,
    reprotects_large::PROMISE,
    lag_bounded::PROMISE,
    linearizable::PROMISE,
    switch_over::PROMISE,
    backup_migrates::PROMISE,
    rolling_upgrade::PROMISE,
    chaos::PROMISE,
    leaves_nothing::PROMISE,
    packaged::PROMISE,
    newcomer::PROMISE,
    lab_hosts::PROMISE,
    rdma_ring::PROMISE,
    rdma_copy::PROMISE,
    rdma_pair::PROMISE,
    chaos_in_lab::PROMISE,
    agents_in_lab::PROMISE,
    slurm_in_lab::PROMISE,
    newcomer_in_lab::PROMISE,
    replay_in_lab::PROMISE,
    linux_replays::PROMISE,
    linux_debugged::PROMISE,
    linux_pair::PROMISE,
    linux_disk::PROMISE,
    linux_busy::PROMISE,
    linux_busy_replay::PROMISE,
    linux_side_by_side::PROMISE,
    prepare_exact::PROMISE,
];
