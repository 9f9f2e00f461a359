//! INFO: what the server is and does.
use core::fmt::Write;

use super::connection::{REDIS_VERSION, Text};
use super::{Call, Outcome};
use crate::settings::DATABASES;

/// The sections in the order they are shown, with the function that writes each, and whether INFO alone shows it.
type Section = (
    &'static str,
    fn(&mut Call<'_, '_>, &mut Text) -> Outcome,
    bool,
);

const SECTIONS: &[Section] = &[
    ("server", server, true),
    ("clients", clients, true),
    ("memory", memory, true),
    ("persistence", persistence, true),
    ("stats", stats, true),
    ("replication", replication, true),
    ("cpu", cpu, true),
    ("modules", modules, true),
    ("errorstats", errorstats, true),
    ("cluster", cluster, true),
    ("keyspace", keyspace, true),
    ("commandstats", commandstats, false),
    ("latencystats", latencystats, false),
];

pub(super) fn info(call: &mut Call<'_, '_>) -> Outcome {
    let mut text = Text::default();
    for (name, write, default) in SECTIONS {
        let named = |index| {
            call.is(index, name)
                || call.is(index, "all")
                || call.is(index, "everything")
                || *default && call.is(index, "default")
        };
        let wanted = match call.len() {
            1 => *default,
            count => (1..count).any(named),
        };
        if wanted {
            if !text.0.is_empty() {
                text.write_str("\r\n")?;
            }
            write(call, &mut text)?;
        }
    }
    call.reply.verbatim(&text.0);
    Ok(())
}

/// Writes lines, each ended as Redis ends them.
macro_rules! lines {
    ($text:expr, $($line:literal $(, $value:expr)*;)*) => {
        $(
            write!($text, $line $(, $value)*)?;
            $text.write_str("\r\n")?;
        )*
    };
}

fn server(call: &mut Call<'_, '_>, text: &mut Text) -> Outcome {
    let [high, low] = call.store.seed;
    let now = call.now;
    let uptime = now.seconds().saturating_sub(call.store.started.seconds());
    lines! { text,
        "# Server";
        "redis_version:{REDIS_VERSION}";
        "redis_git_sha1:00000000";
        "redis_git_dirty:0";
        "redis_build_id:0";
        "redis_mode:standalone";
        "os:Doppel guest x86_64";
        "arch_bits:64";
        "monotonic_clock:guest clock";
        "multiplexing_api:none";
        "atomicvar_api:none";
        "gcc_version:0.0.0";
        "process_id:1";
        "process_supervised:no";
        // Shown to everybody, so nothing of the secret seed must be found in it.
        "run_id:{:040x}", run_id(high, low);
        "tcp_port:6379";
        "server_time_usec:{}", now.micros();
        "uptime_in_seconds:{uptime}";
        "uptime_in_days:{}", uptime / 86400;
        "hz:10";
        "configured_hz:10";
        "lru_clock:{}", now.seconds() & 0xff_ffff;
        "executable:/kv";
        "config_file:";
        "io_threads_active:0";
    }
    Ok(())
}

/// A number that follows from the seed, one way.
fn run_id(high: u64, low: u64) -> u128 {
    let hasher = siphasher::sip128::SipHasher13::new_with_keys(high, low);
    u128::from(hasher.hash(b"run id"))
}

fn clients(call: &mut Call<'_, '_>, text: &mut Text) -> Outcome {
    lines! { text,
        "# Clients";
        "connected_clients:{}", call.store.clients;
        "cluster_connections:0";
        "maxclients:{}", call.store.settings.maxclients;
        "client_recent_max_input_buffer:0";
        "client_recent_max_output_buffer:0";
        "blocked_clients:0";
        "tracking_clients:0";
        "clients_in_timeout_table:0";
    }
    Ok(())
}

/// A number of bytes as people read it.
struct Human(u64);

impl core::fmt::Display for Human {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let bytes = self.0;
        match bytes {
            0..1024 => write!(f, "{bytes}B"),
            1024..0x10_0000 => write!(f, "{:.2}K", bytes as f64 / 1024.0),
            0x10_0000..0x4000_0000 => write!(f, "{:.2}M", bytes as f64 / 1_048_576.0),
            _ => write!(f, "{:.2}G", bytes as f64 / 1_073_741_824.0),
        }
    }
}

fn memory(call: &mut Call<'_, '_>, text: &mut Text) -> Outcome {
    let used = call.store.used_memory() as u64;
    let peak = call.store.peak_memory() as u64;
    let startup = call.store.startup_memory() as u64;
    let limit = call.store.settings.maxmemory;
    let total = call.store.ceiling();
    lines! { text,
        "# Memory";
        "used_memory:{used}";
        "used_memory_human:{}", Human(used);
        "used_memory_rss:{used}";
        "used_memory_rss_human:{}", Human(used);
        "used_memory_peak:{peak}";
        "used_memory_peak_human:{}", Human(peak);
        "used_memory_peak_perc:{:.2}%", used as f64 * 100.0 / peak as f64;
        "used_memory_overhead:{startup}";
        "used_memory_startup:{startup}";
        "used_memory_dataset:{}", used.saturating_sub(startup);
        "total_system_memory:{total}";
        "total_system_memory_human:{}", Human(total);
        "maxmemory:{limit}";
        "maxmemory_human:{}", Human(limit);
        "maxmemory_policy:noeviction";
        "mem_fragmentation_ratio:1.00";
        "mem_fragmentation_bytes:0";
        "mem_allocator:guest";
        "active_defrag_running:0";
        "lazyfree_pending_objects:0";
        "lazyfreed_objects:0";
    }
    Ok(())
}

fn persistence(call: &mut Call<'_, '_>, text: &mut Text) -> Outcome {
    lines! { text,
        "# Persistence";
        "loading:0";
        "async_loading:0";
        "rdb_changes_since_last_save:{}", call.store.stats.changes;
        "rdb_bgsave_in_progress:0";
        "rdb_last_save_time:{}", call.store.started.seconds();
        "rdb_last_bgsave_status:ok";
        "rdb_last_bgsave_time_sec:-1";
        "rdb_current_bgsave_time_sec:-1";
        "rdb_saves:0";
        "aof_enabled:0";
        "aof_rewrite_in_progress:0";
        "aof_rewrite_scheduled:0";
        "aof_last_bgrewrite_status:ok";
        "aof_last_write_status:ok";
    }
    Ok(())
}

fn stats(call: &mut Call<'_, '_>, text: &mut Text) -> Outcome {
    let stats = call.store.stats;
    lines! { text,
        "# Stats";
        "total_connections_received:{}", stats.connections;
        "total_commands_processed:{}", stats.commands;
        "instantaneous_ops_per_sec:0";
        "total_net_input_bytes:{}", stats.input_bytes;
        "total_net_output_bytes:{}", stats.output_bytes;
        "instantaneous_input_kbps:0.00";
        "instantaneous_output_kbps:0.00";
        "rejected_connections:{}", stats.rejected;
        "sync_full:0";
        "sync_partial_ok:0";
        "sync_partial_err:0";
        "expired_keys:{}", stats.expired_keys;
        "evicted_keys:0";
        "keyspace_hits:{}", stats.hits;
        "keyspace_misses:{}", stats.misses;
        "pubsub_channels:0";
        "pubsub_patterns:0";
        "latest_fork_usec:0";
        "total_forks:0";
        "unexpected_error_replies:0";
        "total_error_replies:{}", stats.errors;
    }
    Ok(())
}

fn replication(call: &mut Call<'_, '_>, text: &mut Text) -> Outcome {
    let [high, low] = call.store.seed;
    lines! { text,
        "# Replication";
        "role:master";
        "connected_slaves:0";
        "master_failover_state:no-failover";
        "master_replid:{:040x}", run_id(low, high);
        "master_replid2:{:040x}", 0;
        "master_repl_offset:0";
        "second_repl_offset:-1";
        "repl_backlog_active:0";
        "repl_backlog_size:1048576";
        "repl_backlog_first_byte_offset:0";
        "repl_backlog_histlen:0";
    }
    Ok(())
}

fn cpu(_: &mut Call<'_, '_>, text: &mut Text) -> Outcome {
    lines! { text,
        "# CPU";
        "used_cpu_sys:0.000000";
        "used_cpu_user:0.000000";
        "used_cpu_sys_children:0.000000";
        "used_cpu_user_children:0.000000";
    }
    Ok(())
}

fn modules(_: &mut Call<'_, '_>, text: &mut Text) -> Outcome {
    lines! { text, "# Modules"; }
    Ok(())
}

fn errorstats(call: &mut Call<'_, '_>, text: &mut Text) -> Outcome {
    lines! { text, "# Errorstats"; }
    if call.store.stats.errors > 0 {
        lines! { text, "errorstat_ERR:count={}", call.store.stats.errors; }
    }
    Ok(())
}

fn cluster(_: &mut Call<'_, '_>, text: &mut Text) -> Outcome {
    lines! { text, "# Cluster"; "cluster_enabled:0"; }
    Ok(())
}

fn keyspace(call: &mut Call<'_, '_>, text: &mut Text) -> Outcome {
    lines! { text, "# Keyspace"; }
    for database in 0..DATABASES {
        let keys = call.store.database(database);
        if keys.len() > 0 {
            lines! { text, "db{database}:keys={},expires={},avg_ttl=0", keys.len(), keys.expiring(); }
        }
    }
    Ok(())
}

fn commandstats(_: &mut Call<'_, '_>, text: &mut Text) -> Outcome {
    lines! { text, "# Commandstats"; }
    Ok(())
}

fn latencystats(_: &mut Call<'_, '_>, text: &mut Text) -> Outcome {
    lines! { text, "# Latencystats"; }
    Ok(())
}
