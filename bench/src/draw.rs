//! Pictures: bars, and lines over sizes.
#![forbid(unsafe_code)]

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use serde::{Deserialize, Serialize};

/// One picture among those of a sheet.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum Panel {
    /// Values side by side, from 0.
    Bars {
        /// What they are.
        title: String,
        /// Their unit.
        unit: String,
        /// Name and value of each.
        bars: Vec<(String, f64)>,
    },
    /// Values over sizes, both on logarithmic scales.
    Lines {
        /// What they are.
        title: String,
        /// What is along the bottom.
        x: String,
        /// What is along the side.
        y: String,
        /// Name and points of each line; every number above 0.
        lines: Vec<(String, Vec<(f64, f64)>)>,
    },
}

const WIDTH: u32 = 900;
const ROW: u32 = 24;
const HEAD: u32 = 44;
const LINES_HEIGHT: u32 = 380;
/// Where bars begin, and how long the longest is: room for names before and for values behind.
const BARS_FROM: i32 = 330;
const BARS_LONGEST: f64 = 430.0;

const INK: RGBColor = RGBColor(60, 60, 60);
const COLOURS: [RGBColor; 4] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 120, 20),
    RGBColor(30, 130, 60),
    RGBColor(200, 30, 30),
];

impl Panel {
    fn height(&self) -> u32 {
        match self {
            Self::Bars { bars, .. } => HEAD + ROW * bars.len() as u32 + ROW / 2,
            Self::Lines { .. } => LINES_HEIGHT,
        }
    }
}

/// Draws the panels one below the other.
///
/// # Errors
/// If the file cannot be written.
pub fn write(path: &Path, panels: &[Panel]) -> Result<()> {
    let text = picture(panels)?;
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn picture(panels: &[Panel]) -> Result<String> {
    let height = panels.iter().map(Panel::height).sum::<u32>().max(ROW);
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
        draw_all(&root, panels)
            .and_then(|()| root.present())
            .map_err(|error| anyhow!("cannot draw: {error}"))?;
    }
    Ok(text)
}

/// The picture as a part of a page: ink is the page's own, whether that is light or dark, and there is no ground.
///
/// # Errors
/// If it cannot be drawn.
pub fn inline(panels: &[Panel]) -> Result<String> {
    let text = picture(panels)?;
    let from = text.find("<svg").context("a picture without a beginning")?;
    Ok(text[from..]
        .replace("\"#FFFFFF\"", "\"none\"")
        .replace("\"#3C3C3C\"", "\"currentColor\"")
        .replace("\"#000000\"", "\"currentColor\""))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Failure<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

fn draw_all<'a>(root: &Area<'a>, panels: &[Panel]) -> Result<(), Failure<'a>> {
    root.fill(&WHITE)?;
    let mut rest = root.clone();
    for panel in panels {
        let (area, below) = rest.split_vertically(panel.height());
        match panel {
            Panel::Bars { title, unit, bars } => draw_bars(&area, title, unit, bars)?,
            Panel::Lines { title, x, y, lines } => draw_lines(&area, title, [x, y], lines)?,
        }
        rest = below;
    }
    Ok(())
}

fn draw_bars<'a>(
    area: &Area<'a>,
    title: &str,
    unit: &str,
    bars: &[(String, f64)],
) -> Result<(), Failure<'a>> {
    let font = |size: i32| ("sans-serif", size).into_font().color(&INK);
    area.draw(&Text::new(title.to_owned(), (16, 14), font(18)))?;
    let longest = bars
        .iter()
        .map(|(_, value)| *value)
        .fold(f64::MIN_POSITIVE, f64::max);
    for (index, (name, value)) in bars.iter().enumerate() {
        let top = (HEAD + ROW * index as u32) as i32;
        let length = (value.max(0.0) / longest * BARS_LONGEST).round() as i32;
        let bar = [(BARS_FROM, top), (BARS_FROM + length, top + ROW as i32 - 6)];
        area.draw(&Text::new(name.clone(), (16, top + 2), font(14)))?;
        area.draw(&Rectangle::new(bar, COLOURS[0].filled()))?;
        let shown = format!("{} {unit}", short(*value));
        area.draw(&Text::new(
            shown,
            (BARS_FROM + length + 6, top + 2),
            font(14),
        ))?;
    }
    Ok(())
}

fn draw_lines<'a>(
    area: &Area<'a>,
    title: &str,
    [x, y]: [&str; 2],
    lines: &[(String, Vec<(f64, f64)>)],
) -> Result<(), Failure<'a>> {
    let points = || lines.iter().flat_map(|(_, points)| points);
    let span = |of: fn(&(f64, f64)) -> f64| {
        let least = points().map(of).fold(f64::INFINITY, f64::min);
        let most = points().map(of).fold(f64::MIN_POSITIVE, f64::max);
        least.min(most) / 1.5..most * 1.5
    };
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18).into_font().color(&INK))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(
            span(|point| point.0).log_scale(),
            span(|point| point.1).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc(y)
        .x_label_formatter(&|value| short(*value))
        .y_label_formatter(&|value| short(*value))
        .draw()?;
    for (index, (name, points)) in lines.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        chart
            .draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)).point_size(3))?
            .label(name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], colour.filled()));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(INK)
        .position(SeriesLabelPosition::UpperLeft)
        .draw()
}

/// A number with about three digits.
fn short(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_in_a_page_has_no_colour_of_ink_or_ground() {
        let panels = [
            Panel::Bars {
                title: "Bars".into(),
                unit: "ms".into(),
                bars: vec![("one".into(), 1.0)],
            },
            Panel::Lines {
                title: "Lines".into(),
                x: "x".into(),
                y: "y".into(),
                lines: vec![("two".into(), vec![(1.0, 2.0), (3.0, 4.0)])],
            },
        ];
        let text = inline(&panels).unwrap();
        assert!(text.starts_with("<svg") && text.contains("Lines"));
        for fixed in ["#FFFFFF", "#3C3C3C", "#000000"] {
            assert!(!text.contains(fixed), "{fixed}");
        }
    }
}
