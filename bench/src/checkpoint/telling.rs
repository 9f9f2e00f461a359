//! What requests came to, as tables, figures and pictures.
#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use hypervisor::config::Transport;
use serde_json::{Value, json};

use super::{AIM, Found, histogram, micros};
use crate::draw::Panel;
use crate::sheet::{Aim, Sheet, Table, round};

/// Requests of one size over one transport.
pub(super) struct Row<'a> {
    pub(super) asked: usize,
    pub(super) bytes: usize,
    /// Medians, in microseconds.
    pub(super) link: f64,
    pub(super) alone: f64,
    pub(super) output: &'a Found,
    pub(super) fixed: &'a Found,
}

pub(super) struct Tables {
    pub(super) requests: Option<Table>,
    pub(super) stops: Option<Table>,
    pub(super) anew: Table,
    pub(super) panels: Vec<Panel>,
}

impl Default for Tables {
    fn default() -> Self {
        Self {
            requests: Some(Table::new(
                "Request to reply (µs, half of the time)",
                &[
                    "log over",
                    "pages",
                    "KiB",
                    "alone",
                    "protected",
                    "99 in 100",
                    "added",
                    "commit",
                    "of it the stop",
                    "bare link",
                    "(added − stop) / link",
                    "(commit − stop) / link",
                    "in fixed intervals",
                    "99 in 100",
                ],
            )),
            stops: Some(Table::new(
                "How long the guest stands at an interval's end (µs)",
                &[
                    "log over",
                    "pages",
                    "intervals",
                    "of any size, for a request",
                    "p50",
                    "p90",
                    "p99",
                    "p99.9",
                    "max",
                ],
            )),
            anew: Table::new(
                "Requests whose pages are written from end to end (µs, half of the time)",
                &[
                    "log over",
                    "pages",
                    "KiB",
                    "alone",
                    "protected",
                    "added",
                    "commit",
                    "of it the stop",
                    "bare link",
                    "(added − stop) / link",
                    "(commit − stop) / link",
                ],
            ),
            panels: Vec::new(),
        }
    }
}

/// Of requests that leave nothing of their pages, which is the most that a checkpoint can have to carry.
pub(super) fn tell_anew(
    table: &mut Table,
    transport: Transport,
    found: &Found,
    [asked, alone, link]: [f64; 3],
) -> Result<Value> {
    let (pages, bytes) = (found.pages()?, found.bytes()?);
    let (protected, commit) = (micros(&found.latency, 0.5), micros(&found.commits, 0.5));
    let stop = micros(&found.stops_us(), 0.5);
    let added = round(protected - alone);
    let over = |what: f64| round((what - stop) / link);
    let whole = |of: f64| format!("{of:.0}");
    let ratio = |of: f64| format!("{of:.1}");
    table.row([
        transport.name().to_owned(),
        pages.to_string(),
        whole(bytes as f64 / 1024.0),
        whole(alone),
        whole(protected),
        whole(added),
        whole(commit),
        whole(stop),
        whole(link),
        ratio(over(added)),
        ratio(over(commit)),
    ]);
    Ok(json!({
        "asked": asked, "pages": pages, "bytes": bytes, "requests": found.latency.len(), "alone_us": alone, "output_us": protected,
        "added_us": added, "commit_us": commit, "stop_us": stop, "link_us": link,
        "added_over_link": over(added), "commit_over_link": over(commit),
    }))
}

pub(super) fn tell(
    sheet: &mut Sheet,
    tables: &mut Tables,
    transport: Transport,
    rows: &[Row<'_>],
) -> Result<()> {
    let name = transport.name();
    let mut told: Vec<Value> = Vec::new();
    let mut lines = ["alone", "protected", "2 × bare link + stop", "fixed, 25 ms"]
        .map(|line| (line.to_owned(), Vec::new()));
    let mut points = Vec::new();
    let mut all_stops = histogram();
    for row in rows {
        let pages = row.output.pages()?;
        let (p50, p99) = (
            micros(&row.output.latency, 0.5),
            micros(&row.output.latency, 0.99),
        );
        let stops = row.output.stops_us();
        all_stops.add(&stops)?;
        let (commit, stop) = (micros(&row.output.commits, 0.5), micros(&stops, 0.5));
        let added = round(p50 - row.alone);
        let over = |what: f64| round((what - stop) / row.link);
        let fixed = [0.5, 0.99].map(|quantile| micros(&row.fixed.latency, quantile));
        let kib = row.bytes as f64 / 1024.0;
        if let Some(table) = &mut tables.requests {
            table.row([
                name.to_owned(),
                pages.to_string(),
                format!("{kib:.0}"),
                format!("{:.0}", row.alone),
                format!("{p50:.0}"),
                format!("{p99:.0}"),
                format!("{added:.0}"),
                format!("{commit:.0}"),
                format!("{stop:.0}"),
                format!("{:.0}", row.link),
                format!("{:.1}", over(added)),
                format!("{:.1}", over(commit)),
                format!("{:.0}", fixed[0]),
                format!("{:.0}", fixed[1]),
            ]);
        }
        let quantiles = [0.5, 0.9, 0.99, 0.999, 1.0].map(|quantile| micros(&stops, quantile));
        if let Some(table) = &mut tables.stops {
            let [a, b, c, d, e] = quantiles.map(|micros| format!("{micros:.0}"));
            let (pages, count) = (pages.to_string(), stops.len().to_string());
            let any = format!("{:.1}", row.output.intervals_a_request());
            table.row([name.to_owned(), pages, count, any, a, b, c, d, e]);
        }
        for ((_, line), value) in
            lines
                .iter_mut()
                .zip([row.alone, p50, AIM * row.link + stop, fixed[0]])
        {
            line.push((kib, value));
        }
        points.push((pages as f64, stop));
        sheet.aims.push(Aim::at_most(
            &format!("{name}, {pages} pages: what protection adds, less the stop / the same bytes over the bare link"),
            AIM,
            over(added),
            &format!(
                "of {added:.0} µs the guest's own part is {:.0}: the time up to its reply, beyond what that takes alone",
                added - commit
            ),
        ));
        let [p50_stop, p90, p99_stop, p999, max] = quantiles;
        told.push(json!({
            "asked": row.asked, "pages": pages, "bytes": row.bytes, "requests": row.output.latency.len(),
            "alone_us": row.alone, "output_us": {"p50": p50, "p99": p99}, "fixed_us": {"p50": fixed[0], "p99": fixed[1]},
            "added_us": added, "commit_us": {"p50": commit, "p99": micros(&row.output.commits, 0.99)}, "link_us": row.link,
            "added_over_link": over(added), "commit_over_link": over(commit),
            "intervals_a_request": row.output.intervals_a_request(),
            "stop_us": {"count": stops.len(), "least": micros(&stops, 0.0), "p50": p50_stop, "p90": p90, "p99": p99_stop, "p999": p999, "max": max},
        }));
    }
    let (slope, at_none) = line_through(&points);
    let last = rows.last().context("no sizes")?;
    sheet.figure(
        name,
        json!({
            "sizes": told,
            "stop_us_a_page": round(slope), "stop_us_at_none": round(at_none),
            "link_mb_s": (last.bytes as f64 / last.link).round(),
            "stops_us": buckets(&all_stops),
        }),
    );
    sheet.note(format!(
        "Log over {name}: the stop is {at_none:.0} µs and {slope:.2} for each page (a line through the medians); the bare link carries \
         {:.0} MB/s at its largest block.",
        last.bytes as f64 / last.link
    ));
    tables.panels.push(Panel::Lines {
        title: format!("Request to reply, log over {name}, half of the time"),
        x: "KiB that it has the guest write".into(),
        y: "µs".into(),
        lines: lines.into(),
    });
    tables.panels.push(Panel::Bars {
        title: format!("Stops at the ends of intervals, log over {name}: how many were how long"),
        unit: "intervals".into(),
        bars: buckets(&all_stops)
            .into_iter()
            .map(|(to, count)| (format!("to {to} µs"), count as f64))
            .collect(),
    });
    Ok(())
}

/// How many were at most so long and longer than the one before, in microseconds: each twice the one before.
fn buckets(stops: &Histogram<u64>) -> Vec<(u64, u64)> {
    let mut buckets: Vec<(u64, u64)> = Vec::new();
    for value in stops.iter_recorded() {
        let to = (value.value_iterated_to().div_ceil(1000)).next_power_of_two();
        match buckets.last_mut() {
            Some((last, count)) if *last == to => *count += value.count_since_last_iteration(),
            _ => buckets.push((to, value.count_since_last_iteration())),
        }
    }
    buckets
}

/// Slope and height at 0 of the line with the least squares.
fn line_through(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len().max(1) as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let spread: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    let slope = points
        .iter()
        .map(|point| (point.0 - x) * (point.1 - y))
        .sum::<f64>()
        / spread.max(f64::MIN_POSITIVE);
    (slope, y - slope * x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_the_one_that_was_drawn() {
        let points: Vec<(f64, f64)> = [10.0, 100.0, 1000.0].map(|x| (x, 45.0 + 1.25 * x)).to_vec();
        let (slope, at_none) = line_through(&points);
        assert!((slope - 1.25).abs() < 1e-9 && (at_none - 45.0).abs() < 1e-6);
        assert_eq!(line_through(&[(5.0, 7.0)]), (0.0, 7.0));
    }

    #[test]
    fn stops_fall_into_buckets() {
        let mut stops = histogram();
        for micros in [60, 61, 100, 900] {
            stops.record(micros * 1000).unwrap();
        }
        assert_eq!(buckets(&stops), [(64, 2), (128, 1), (1024, 1)]);
    }
}
