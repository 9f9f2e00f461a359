//! Commands about the server: its databases, its clock, its settings.
use alloc::vec::Vec;

use super::{Call, Failure, Outcome};
use crate::OutOfMemory;
use crate::glob;
use crate::settings::{self, SETTINGS, Setting, Settings};
use crate::store::Stats;

pub(super) fn dbsize(call: &mut Call<'_, '_>) -> Outcome {
    call.reply.count(call.store.len(call.client.database));
    Ok(())
}

/// Checks FLUSHALL's option. Both ways are the same here: memory is freed at once.
fn check_flush(call: &Call<'_, '_>) -> Outcome {
    match call.len() {
        1 => Ok(()),
        2 if call.is(1, "sync") || call.is(1, "async") => Ok(()),
        _ => Err(Failure::Syntax),
    }
}

pub(super) fn flushall(call: &mut Call<'_, '_>) -> Outcome {
    check_flush(call)?;
    call.store.flush_all();
    call.reply.ok();
    Ok(())
}

pub(super) fn flushdb(call: &mut Call<'_, '_>) -> Outcome {
    check_flush(call)?;
    call.store.flush(call.client.database);
    call.reply.ok();
    Ok(())
}

pub(super) fn time(call: &mut Call<'_, '_>) -> Outcome {
    let micros = call.now.micros();
    call.reply.array(2);
    call.reply.bulk_number(micros / 1_000_000);
    call.reply.bulk_number(micros % 1_000_000);
    Ok(())
}

pub(super) fn config_get(call: &mut Call<'_, '_>) -> Outcome {
    let is_pattern = |text: &[u8]| text.iter().any(|byte| b"[*?".contains(byte));
    let names = |text: &[u8], setting: &Setting| {
        let name = setting.name.as_bytes();
        if is_pattern(text) {
            glob::matches(text, name, true)
        } else {
            text.eq_ignore_ascii_case(name)
        }
    };
    let mark = call.reply.mark();
    let mut pairs = 0;
    for setting in SETTINGS {
        let Some(index) = (2..call.len()).find(|&index| names(&call.args[index], setting)) else {
            continue;
        };
        // A name that was spelt out is given back as it was spelt.
        let text = &call.args[index];
        let name = if is_pattern(text) {
            setting.name.as_bytes()
        } else {
            text
        };
        let mut digits = itoa::Buffer::new();
        let value = call.store.settings.show(setting, &mut digits);
        call.reply.bulk(name);
        call.reply.bulk(value.as_bytes());
        pairs += 1;
    }
    call.reply.map_at(mark, pairs);
    Ok(())
}

pub(super) fn config_set(call: &mut Call<'_, '_>) -> Outcome {
    if !call.len().is_multiple_of(2) {
        return Err(Failure::Syntax);
    }
    let mut changes: Vec<(&'static Setting, &[u8])> = Vec::new();
    changes
        .try_reserve(call.len() / 2)
        .map_err(OutOfMemory::from)?;
    let mut problem = None;
    for index in (2..call.len()).step_by(2) {
        let name = call.args.word(index);
        let Some(setting) = settings::find(name) else {
            if problem.is_none() {
                call.reply.error_parts(&[
                    b"ERR Unknown option or number of arguments for CONFIG SET - '",
                    name,
                    b"'",
                ]);
                return Ok(());
            }
            continue;
        };
        if problem.is_none() {
            if Settings::is_immutable(setting) {
                problem = Some((name, "can't set immutable config"));
            } else if changes.iter().any(|(other, _)| other.name == setting.name) {
                problem = Some((name, "duplicate parameter"));
            }
        }
        changes.push((setting, &call.args[index + 1]));
    }
    let outcome = match problem {
        Some(problem) => Err(problem),
        None => call
            .store
            .settings
            .change(&changes)
            .map_err(|(name, reason)| (name.as_bytes(), reason)),
    };
    match outcome {
        Ok(()) => call.reply.ok(),
        Err((name, reason)) => call.reply.error_parts(&[
            b"ERR CONFIG SET failed (possibly related to argument '",
            name,
            b"') - ",
            reason.as_bytes(),
        ]),
    }
    Ok(())
}

pub(super) fn config_resetstat(call: &mut Call<'_, '_>) -> Outcome {
    call.store.stats = Stats::default();
    call.reply.ok();
    Ok(())
}

pub(super) fn config_rewrite(_: &mut Call<'_, '_>) -> Outcome {
    Err(Failure::Text(
        "ERR The server is running without a config file",
    ))
}

pub(super) fn config_help(call: &mut Call<'_, '_>) -> Outcome {
    super::docs::help_lines(
        call,
        &[
            "GET <pattern>",
            "    The settings whose names match, and their values.",
            "SET <directive> <value>",
            "    Change a setting.",
            "RESETSTAT",
            "    Set the counters that INFO shows to zero.",
            "REWRITE",
            "    Write the settings to the configuration file.",
        ],
    )
}
