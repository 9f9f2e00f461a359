//! What lives came to, as tables and figures.
#![forbid(unsafe_code)]

use serde_json::{Map, Value, json};

use super::hosts::Host;
use super::{Life, PARTS};
use crate::draw::Panel;
use crate::sheet::{Sheet, Table, median, round};

/// What is compared: boot, the parts, the whole life.
const COLUMNS: usize = PARTS.len() + 2;

/// What a life took, in seconds.
fn times(life: &Life) -> [Option<f64>; COLUMNS] {
    std::array::from_fn(|column| match column {
        0 => life.boot,
        column if column <= PARTS.len() => life.parts[column - 1],
        _ => life.whole,
    })
}

/// Medians of those that came so far, in seconds.
fn medians(lives: &[Life]) -> [Option<f64>; COLUMNS] {
    std::array::from_fn(|column| {
        let all: Vec<f64> = lives
            .iter()
            .filter_map(|life| times(life)[column])
            .collect();
        (!all.is_empty()).then(|| round(median(all)))
    })
}

/// Values of the columns, by their keys.
fn keyed(values: &[Option<f64>; COLUMNS]) -> Value {
    let keys = ["boot"]
        .into_iter()
        .chain(PARTS.map(|(key, _)| key))
        .chain(["whole"]);
    keys.zip(values)
        .map(|(key, value)| (key.to_owned(), json!(value)))
        .collect::<Map<_, _>>()
        .into()
}

/// Puts them into the sheet.
pub fn tell(sheet: &mut Sheet, found: &[(Host, Vec<Life>)]) {
    let mut names = vec!["", "came to their end"];
    let parts = PARTS.map(|(_, name)| name);
    names.push("boot");
    names.extend(parts);
    names.push("boot to power-off");
    let mut seconds = Table::new("Seconds", &names);
    let mut ratios = Table::new(
        "Time, as a ratio to `doppel run` of the same kernel, a replay's to its recording (1 is equal, 2 takes twice as long)",
        &names,
    );
    let shown = |value: Option<f64>, places: usize| {
        value.map_or_else(|| "–".to_owned(), |value| format!("{value:.places$}"))
    };
    let of = |host: Host| {
        let found = found.iter().find(|(other, _)| *other == host);
        found.map_or([None; COLUMNS], |(_, lives)| medians(lives))
    };
    let mut rows: Vec<Value> = Vec::new();
    let mut bars = Vec::new();
    for (host, lives) in found {
        let medians = medians(lives);
        let against = of(host.base());
        let ratio: [Option<f64>; COLUMNS] = std::array::from_fn(|at| {
            if at == COLUMNS - 1 && !host.works() {
                // It only boots; a replay's is compared with its recording.
                return Some(round(medians[at]? / of(host.recording()?)[at]?));
            }
            Some(round(medians[at]? / against[at]?))
        });
        let whole = lives.iter().filter(|life| life.whole.is_some()).count();
        let count = format!("{whole} of {}", lives.len());
        let cells = |values: &[Option<f64>], places| {
            let mut cells = vec![host.name().to_owned(), count.clone()];
            cells.extend(values.iter().map(|&value| shown(value, places)));
            cells
        };
        seconds.rows.push(cells(&medians, 2));
        ratios.rows.push(cells(&ratio, 2));
        if let Some(boot) = medians[0] {
            bars.push((host.name().to_owned(), boot));
        }
        let failed: Vec<&String> = lives
            .iter()
            .filter_map(|life| life.failed.as_ref())
            .collect();
        for why in &failed {
            sheet.note(format!("{}: {why}", host.name()));
        }
        rows.push(json!({
            "name": host.name(), "key": host.key(), "runs": lives.len(), "whole": whole, "seconds": keyed(&medians), "ratio": keyed(&ratio),
            "lives": lives.iter().map(|life| keyed(&times(life).map(|time| time.map(round)))).collect::<Vec<_>>(), "exits": last_exits(lives), "failed": failed,
        }));
    }
    sheet.figure("hosts", rows);
    sheet.tables = vec![ratios, seconds, exits(found)];
    sheet.panels.push(Panel::Bars {
        title: "Until the guest's first process has come up".into(),
        unit: "s".into(),
        bars,
    });
}

/// The exits of the last life that told them.
fn last_exits(lives: &[Life]) -> Option<&Map<String, Value>> {
    lives.iter().rev().find_map(|life| life.exits.as_ref())
}

/// What exits were for, the kinds of which somebody made most first.
fn exits(found: &[(Host, Vec<Life>)]) -> Table {
    let told: Vec<(Host, &Map<String, Value>)> = found
        .iter()
        .filter_map(|(host, lives)| Some((*host, last_exits(lives)?)))
        .collect();
    let count = |exits: &Map<String, Value>, kind: &str| exits.get(kind).and_then(Value::as_u64);
    let mut kinds: Vec<(&String, u64)> = Vec::new();
    for (kind, most) in told.iter().flat_map(|(_, exits)| exits.iter()) {
        let most = most.as_u64().unwrap_or_default();
        match kinds.iter_mut().find(|(other, _)| *other == kind) {
            Some((_, known)) => *known = most.max(*known),
            None => kinds.push((kind, most)),
        }
    }
    kinds.sort_by_key(|(_, most)| std::cmp::Reverse(*most));
    let mut columns = vec!["", "all"];
    columns.extend(kinds.iter().map(|(kind, _)| kind.as_str()));
    let mut table = Table::new("Exits of the last life, by what they were for", &columns);
    for (host, exits) in &told {
        let all: u64 = exits.values().filter_map(Value::as_u64).sum();
        let of = kinds
            .iter()
            .map(|(kind, _)| count(exits, kind).unwrap_or_default().to_string());
        let mut cells = vec![host.name().to_owned(), all.to_string()];
        cells.extend(of);
        table.rows.push(cells);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_that_did_not_come_so_far_are_not_counted() {
        let boots = [Some(3.0), None, Some(5.0)];
        let lives = boots.map(|boot| Life {
            boot,
            ..Life::default()
        });
        assert_eq!(medians(&lives)[0], Some(4.0));
        assert_eq!(medians(&lives)[1..], [None; COLUMNS - 1]);
        let each: Vec<Value> = lives
            .iter()
            .map(|life| keyed(&times(life))["boot"].clone())
            .collect();
        assert_eq!(each, [json!(3.0), Value::Null, json!(5.0)]);
    }

    #[test]
    fn exits_are_told_by_kind_the_most_first() {
        let life = |exits: Value| Life {
            exits: exits.as_object().cloned(),
            ..Life::default()
        };
        let found = [
            (Host::Page, vec![life(json!({"time": 3, "halt": 20}))]),
            (Host::Qemu, vec![Life::default()]),
            (Host::Timer, vec![life(json!({"time": 900}))]),
        ];
        let table = exits(&found);
        assert_eq!(table.columns, ["", "all", "time", "halt"]);
        assert_eq!(table.rows[0][1..], ["23", "3", "20"]);
        assert_eq!(table.rows[1][1..], ["900", "900", "0"]);
        assert_eq!(table.rows.len(), 2);
    }
}
