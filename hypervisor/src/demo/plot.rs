//! The client's latency over time as a picture: the whole run, and the failover from close by.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::client::{Sample, Series};
use super::report::millis;
use crate::backends::wait::Moment;

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// No request was answered, so there is nothing to draw.
    #[error("there is nothing to draw: no request was answered")]
    Nothing,
    /// The file cannot be written, or drawing failed.
    #[error("cannot draw {}: {words}", path.display())]
    Draw {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        words: String,
    },
}

const SIZE: (u32, u32) = (1000, 720);
/// Shown on each side of the failover, at least.
const AROUND: Duration = Duration::from_millis(50);
/// Points drawn in one panel. More would blur into each other, and the file would grow for nothing.
const POINTS: usize = 4000;

const INK: RGBColor = RGBColor(60, 60, 60);
const QUICK: RGBColor = RGBColor(31, 119, 180);
const SLOW: RGBColor = RGBColor(214, 120, 20);
const KILL: RGBColor = RGBColor(200, 30, 30);
const SERVED: RGBColor = RGBColor(30, 130, 60);

/// Draws the series into an SVG file.
pub fn draw(series: &Series, path: &Path) -> Result<(), PlotError> {
    if series.near.is_empty() {
        return Err(PlotError::Nothing);
    }
    let failed = |error: &dyn std::error::Error| PlotError::Draw {
        path: path.to_owned(),
        words: error.to_string(),
    };
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    draw_on(series, &root).map_err(|error| failed(&error))?;
    root.present().map_err(|error| failed(&error))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Failure<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

fn draw_on<'a>(series: &Series, root: &Area<'a>) -> Result<(), Failure<'a>> {
    root.fill(&WHITE)?;
    let (whole, close) = root.split_vertically(SIZE.1 / 2);
    let end = series
        .near
        .iter()
        .map(|sample| seconds(series, sample.done))
        .fold(0.0, f64::max);

    let slices: Vec<_> = series
        .slices
        .iter()
        .enumerate()
        .filter(|(_, slice)| slice.count > 0)
        .map(|(index, slice)| {
            let at = (series.slice * index as u32).as_secs_f64();
            (at, millis(slice.min), millis(slice.max))
        })
        .collect();
    let end = slices.last().map_or(end, |(at, ..)| end.max(*at));
    let quickest = slices.iter().map(|(at, min, _)| (*at, *min));
    let slowest = slices.iter().map(|(at, _, max)| (*at, *max));
    let panel = Panel {
        series,
        title: format!(
            "Latency as the clients saw it: quickest and slowest request of each {} ms",
            millis(series.slice)
        ),
        x: 0.0..end.max(0.001),
        x_label: "time the request was sent (s)",
        scale: 1.0,
    };
    let sets = [
        Set::dots("slowest", SLOW, thin(slowest)),
        Set::dots("quickest", QUICK, thin(quickest)),
    ];
    panel.draw(&whole, &sets)?;
    draw_close(series, &close)
}

/// Every request around the failover; without one, the run's last ones.
fn draw_close<'a>(series: &Series, area: &Area<'a>) -> Result<(), Failure<'a>> {
    let (from, to) = match (series.kill, series.served_again) {
        (Some(kill), Some(served)) => {
            let margin = AROUND.max(served.since(kill));
            (before(kill, margin), served.plus(margin))
        }
        (Some(kill), None) => (before(kill, AROUND), kill.plus(AROUND * 10)),
        (None, _) => {
            let last = series.near.iter().map(|sample| sample.done).max();
            let last = last.unwrap_or(series.start);
            (before(last, AROUND * 2), last)
        }
    };
    let shown = |sample: &&Sample| (from..=to).contains(&sample.sent);
    let zero = series.kill.unwrap_or(series.start);
    let waited = |sample: &Sample| {
        let killed = series.kill.is_some_and(|kill| sample.done > kill);
        killed
            && series
                .served_again
                .is_none_or(|served| sample.sent < served)
    };
    let point = |sample: &Sample| {
        let at = signed_seconds(sample.sent, zero) * 1e3;
        (at, millis(sample.latency()))
    };
    let (waiting, others): (Vec<&Sample>, Vec<&Sample>) = series
        .near
        .iter()
        .filter(shown)
        .partition(|sample| waited(sample));
    let waits = waiting
        .iter()
        .map(|sample| signed_seconds(sample.done, zero) * 1e3)
        .map(|answered| answered.min(signed_seconds(to, zero) * 1e3));
    let waiting = Set {
        waits: Some(waits.collect()),
        ..Set::dots(
            "waiting, sent to answered",
            SLOW,
            waiting.iter().map(|sample| point(sample)).collect(),
        )
    };
    let others = thin(others.iter().map(|sample| point(sample)));
    let mut sets = vec![Set::dots("one request", QUICK, others)];
    if series.kill.is_some() {
        sets.push(waiting);
    }
    let panel = Panel {
        series,
        title: match (series.kill, series.served_again) {
            (Some(kill), Some(served)) => format!(
                "The failover: each request; {:.1} ms from the kill to the first byte served",
                millis(served.since(kill))
            ),
            (Some(_), None) => "The kill: each request; no service after it".to_owned(),
            (None, _) => "The end of the run: each request".to_owned(),
        },
        x: signed_seconds(from, zero) * 1e3..signed_seconds(to, zero) * 1e3,
        x_label: if series.kill.is_some() {
            "time the request was sent, from the kill on (ms)"
        } else {
            "time the request was sent (ms)"
        },
        scale: 1e3,
    };
    panel.draw(area, &sets)
}

/// Points of one kind.
struct Set {
    name: &'static str,
    colour: RGBColor,
    points: Vec<(f64, f64)>,
    /// For each point, the x at which its wait ended.
    waits: Option<Vec<f64>>,
}

impl Set {
    fn dots(name: &'static str, colour: RGBColor, points: Vec<(f64, f64)>) -> Self {
        Self {
            name,
            colour,
            points,
            waits: None,
        }
    }
}

struct Panel<'s> {
    series: &'s Series,
    title: String,
    x: Range<f64>,
    x_label: &'static str,
    /// Units of x in a second. With 1000, x counts from the kill.
    scale: f64,
}

impl Panel<'_> {
    fn draw<'a>(&self, area: &Area<'a>, sets: &[Set]) -> Result<(), Failure<'a>> {
        let y = decades(sets.iter().flat_map(|set| &set.points).map(|(_, y)| *y));
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, ("sans-serif", 17).into_font().color(&INK))
            .margin(12)
            .margin_right(24)
            .x_label_area_size(42)
            .y_label_area_size(68)
            .build_cartesian_2d(self.x.clone(), y.clone().log_scale())?;
        chart
            .configure_mesh()
            .x_desc(self.x_label)
            .y_desc("latency")
            .x_labels(11)
            .y_labels(8)
            .x_label_formatter(&|x| trimmed(*x))
            .y_label_formatter(&|y| latency_label(*y))
            .bold_line_style(RGBColor(225, 225, 225))
            .light_line_style(TRANSPARENT)
            .axis_style(INK)
            .label_style(("sans-serif", 13).into_font().color(&INK))
            .axis_desc_style(("sans-serif", 14).into_font().color(&INK))
            .draw()?;
        for (at, colour, name) in self.marks() {
            let style = colour.stroke_width(2);
            let bottom_to_top = [(at, y.start), (at, y.end)];
            chart
                .draw_series(LineSeries::new(bottom_to_top, style))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
        }
        for set in sets {
            let style = set.colour.mix(0.7).filled();
            for (from, until) in set.points.iter().zip(set.waits.iter().flatten()) {
                let line = [*from, (*until, from.1)];
                chart.draw_series(LineSeries::new(line, set.colour.mix(0.6).stroke_width(2)))?;
            }
            let size = if set.waits.is_some() { 3 } else { 2 };
            let dots = set
                .points
                .iter()
                .map(|point| Circle::new(*point, size, style));
            chart
                .draw_series(dots)?
                .label(set.name)
                .legend(move |(x, y)| Circle::new((x + 8, y), 4, style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(200, 200, 200))
            .label_font(("sans-serif", 13).into_font().color(&INK))
            .draw()
    }

    /// The kill and the first reply after it, where they stand on this panel's axis.
    fn marks(&self) -> Vec<(f64, RGBColor, &'static str)> {
        let zero = if self.scale == 1.0 {
            self.series.start
        } else {
            self.series.kill.unwrap_or(self.series.start)
        };
        [
            (self.series.kill, KILL, "primary killed"),
            (self.series.served_again, SERVED, "first byte served"),
        ]
        .into_iter()
        .filter_map(|(moment, colour, name)| {
            let at = signed_seconds(moment?, zero) * self.scale;
            self.x.contains(&at).then_some((at, colour, name))
        })
        .collect()
    }
}

fn seconds(series: &Series, moment: Moment) -> f64 {
    moment.since(series.start).as_secs_f64()
}

fn signed_seconds(moment: Moment, zero: Moment) -> f64 {
    moment.since(zero).as_secs_f64() - zero.since(moment).as_secs_f64()
}

fn before(moment: Moment, time: Duration) -> Moment {
    Moment::from_nanos(moment.as_nanos().saturating_sub(time.as_nanos() as u64))
}

/// At most so many points, with the highest of each group: an outlier must not go.
fn thin(points: impl Iterator<Item = (f64, f64)>) -> Vec<(f64, f64)> {
    let points: Vec<_> = points.collect();
    let group = points.len().div_ceil(POINTS).max(1);
    let highest = |group: &[(f64, f64)]| {
        let by_height = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        group.iter().max_by(by_height).copied()
    };
    points.chunks(group).filter_map(highest).collect()
}

/// The decades, in milliseconds, that hold all the values.
fn decades(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    if low > high {
        return 0.1..10.0;
    }
    let low = low.max(1e-3).log10().floor();
    let high = high.max(1e-3).log10().ceil().max(low + 1.0);
    // A little below, or the lowest label would be left out.
    10_f64.powf(low) * 0.9..10_f64.powf(high)
}

fn trimmed(value: f64) -> String {
    // Without the "-0" that rounding makes.
    let text = format!("{:.3}", value + 0.0);
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0" } else { text }.to_owned()
}

fn latency_label(millis: f64) -> String {
    if millis < 0.999 {
        format!("{} µs", trimmed(millis * 1e3))
    } else if millis < 999.0 {
        format!("{} ms", trimmed(millis))
    } else {
        format!("{} s", trimmed(millis / 1e3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::client::Slice;

    fn series(kill: bool) -> Series {
        let start = Moment::from_nanos(5_000_000_000);
        let at = |micros: u64| start.plus(Duration::from_micros(micros));
        let (killed, served) = (at(1_500_000), at(1_512_000));
        let mut slices = vec![Slice::default(); 3000];
        let mut near = Vec::new();
        for number in 0..24_000_u64 {
            let sent = at(number * 125);
            let mut done = sent.plus(Duration::from_micros(100 + number * 7919 % 300));
            if kill && sent < served && done > killed {
                done = served.plus(Duration::from_micros(number % 8 * 200));
            }
            if kill && sent > killed && sent < served {
                continue;
            }
            let latency = done.since(sent);
            let slice = &mut slices[(number * 125 / 1000) as usize];
            *slice = Slice {
                count: slice.count + 1,
                min: if slice.count == 0 {
                    latency
                } else {
                    slice.min.min(latency)
                },
                max: slice.max.max(latency),
            };
            near.push(Sample { sent, done });
        }
        Series {
            start,
            kill: kill.then_some(killed),
            served_again: kill.then_some(served),
            slice: Duration::from_millis(1),
            slices,
            near,
        }
    }

    #[test]
    fn the_kill_is_marked_and_the_file_stays_small() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.svg");
        draw(&series(true), &path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for words in [
            "primary killed",
            "first byte served",
            "12.0 ms",
            "latency",
            "1 ms",
        ] {
            assert!(svg.contains(words), "no `{words}`");
        }
        assert!(svg.len() < 2 << 20, "{} bytes", svg.len());
        if let Ok(keep) = std::env::var("DOPPEL_KEEP_PLOT") {
            std::fs::copy(&path, keep).unwrap();
        }
    }

    #[test]
    fn a_run_without_a_kill_is_drawn_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.svg");
        draw(&series(false), &path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.contains("end of the run") && !svg.contains("primary killed"));
    }

    #[test]
    fn what_cannot_be_drawn_is_told() {
        let mut empty = series(false);
        empty.near.clear();
        let nowhere = Path::new("/nonexistent/demo.svg");
        assert!(matches!(draw(&empty, nowhere), Err(PlotError::Nothing)));
        let error = draw(&series(true), nowhere).unwrap_err();
        assert!(
            error.to_string().contains("/nonexistent/demo.svg"),
            "{error}"
        );
    }

    #[test]
    fn thinning_keeps_the_outlier() {
        let points = (0..100_000).map(|x| (f64::from(x), if x == 777 { 9.0 } else { 1.0 }));
        let thinned = thin(points);
        assert!(thinned.len() <= POINTS);
        assert!(thinned.contains(&(777.0, 9.0)));
    }
}
