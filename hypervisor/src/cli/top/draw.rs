//! One frame: a banner, the roles, throughput, events.

use hypervisor::control::find::Found;
use hypervisor::control::status::{Happened, Role, Status};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Cell, Paragraph, Row, Sparkline, Table};

use crate::cli::figures::{bytes, count, micros, span, time_of_day};
use crate::cli::status::{is_protected, protection};

const ALARM: Style = Style::new()
    .fg(Color::White)
    .bg(Color::Red)
    .add_modifier(Modifier::BOLD);
const GOOD: Style = Style::new().fg(Color::Green).add_modifier(Modifier::BOLD);
const FAINT: Style = Style::new().fg(Color::DarkGray);
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);

pub fn draw(frame: &mut Frame<'_>, found: &[Found]) {
    let rows = u16::try_from(found.len()).unwrap_or(u16::MAX);
    let [banner, roles, throughput, events] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(rows.saturating_add(3).min(12)),
        Constraint::Length(6),
        Constraint::Min(3),
    ])
    .areas(frame.area());
    frame.render_widget(banner_of(found), banner);
    frame.render_widget(table_of(found, roles.width), roles);
    sparklines(frame, throughput, found);
    frame.render_widget(events_of(found, events), events);
}

fn statuses(found: &[Found]) -> impl Iterator<Item = &Status> {
    found.iter().filter_map(|found| found.outcome.as_ref().ok())
}

/// One word for each machine; the whole line is red if one is unprotected.
fn banner_of(found: &[Found]) -> Paragraph<'static> {
    let mut names: Vec<&str> = found.iter().map(|found| found.name.as_str()).collect();
    names.dedup();
    let mut all_well = !names.is_empty();
    let mut words = vec![" doppel ".to_owned()];
    for name in &names {
        let of = found.iter().filter(|found| found.name == *name);
        let protected = is_protected(of.clone());
        all_well &= protected == Some(true);
        let epoch = of
            .filter_map(|found| found.outcome.as_ref().ok())
            .map(|status| status.epoch)
            .max()
            .unwrap_or(0);
        words.push(format!(" {name} {} epoch {epoch} ", protection(protected)));
    }
    if names.is_empty() {
        words.push(" no machine runs here any more ".to_owned());
    }
    let style = if all_well { GOOD } else { ALARM };
    Paragraph::new(words.join("·")).style(style)
}

/// What a column is called, and how wide it is.
const COLUMNS: [(&str, u16); 11] = [
    ("MACHINE", 9),
    ("ROLE", 7),
    ("STANDING", 20),
    ("EPOCH", 5),
    ("POSITION", 11),
    ("LAG", 8),
    ("COMMIT p50", 10),
    ("p99", 8),
    ("max", 8),
    ("LOG/s", 9),
    ("PEER", 15),
];

/// Columns that go first where there is no room for all.
const SPARE: [usize; 7] = [10, 9, 8, 4, 7, 5, 6];

/// The columns that fit into this width.
fn columns(width: u16) -> Vec<usize> {
    let mut kept: Vec<usize> = (0..COLUMNS.len()).collect();
    for spare in SPARE {
        let taken: u16 = kept.iter().map(|&at| COLUMNS[at].1 + 1).sum();
        if taken <= width + 1 {
            break;
        }
        kept.retain(|&at| at != spare);
    }
    kept
}

fn table_of(found: &[Found], width: u16) -> Table<'static> {
    let kept = columns(width);
    let of = |mut cells: Vec<Cell<'static>>| {
        let cells: Vec<Cell<'static>> = kept
            .iter()
            .map(|&at| std::mem::take(&mut cells[at]))
            .collect();
        Row::new(cells)
    };
    let rows: Vec<Row<'static>> = found
        .iter()
        .map(|found| match &found.outcome {
            Ok(status) => of(cells(status)),
            Err(_) => {
                let mut cells = vec![Cell::default(); COLUMNS.len()];
                cells[0] = Cell::from(found.name.clone());
                cells[2] = Cell::from("SILENT");
                of(cells).style(ALARM)
            }
        })
        .collect();
    let head = Row::new(kept.iter().map(|&at| COLUMNS[at].0)).style(FAINT);
    let widths = kept.iter().map(|&at| Constraint::Length(COLUMNS[at].1));
    Table::new(rows, widths)
        .header(head)
        .block(Block::new().borders(Borders::BOTTOM).border_style(FAINT))
}

fn cells(status: &Status) -> Vec<Cell<'static>> {
    let standing = status.standing.word().replace('_', " ");
    let (standing, style) = if status.protected {
        (standing, GOOD)
    } else if status.standing.is_unprotected() {
        (standing.to_uppercase(), ALARM)
    } else {
        (standing, BOLD)
    };
    let none = || "-".to_owned();
    let commits = status.role != Role::Backup && status.protected;
    // What happens now; since the start, while nothing does.
    let commit = match status.commit_recent.count {
        0 => status.commit,
        _ => status.commit_recent,
    };
    let latency = |value: f64| if commits { micros(value) } else { none() };
    let peer = status.peer.as_ref();
    let address = peer.and_then(|peer| peer.address.clone());
    vec![
        Cell::from(status.name.clone()),
        Cell::from(status.role.word()),
        Cell::from(Span::styled(
            format!("{standing} {}", span(status.standing_ms)),
            style,
        )),
        Cell::from(status.epoch.to_string()),
        Cell::from(count(status.position as f64)),
        Cell::from(status.lag_us.map_or_else(none, micros)),
        Cell::from(latency(commit.p50_us)),
        Cell::from(latency(commit.p99_us)),
        Cell::from(latency(commit.max_us)),
        Cell::from(bytes(status.rates.entry_bytes)),
        Cell::from(address.unwrap_or_else(none)),
    ]
}

/// Those who serve; where nobody does, all.
fn sparklines(frame: &mut Frame<'_>, area: Rect, found: &[Found]) {
    let serving: Vec<&Status> = statuses(found)
        .filter(|status| status.role != Role::Backup)
        .collect();
    let shown: Vec<&Status> = match serving.is_empty() {
        true => statuses(found).collect(),
        false => serving,
    };
    // Two windows of a person's width.
    let shown = &shown[..shown.len().min(2)];
    let parts = Layout::horizontal(vec![Constraint::Fill(1); shown.len().max(1)]).split(area);
    for (status, part) in shown.iter().zip(parts.iter()) {
        let title = format!(
            " {} {}: {} exits/s, {} outputs/s, {}/s of log ",
            status.name,
            status.role.word(),
            count(status.rates.exits),
            count(status.rates.outputs),
            bytes(status.rates.entry_bytes)
        );
        let block = Block::new().title(Span::styled(title, BOLD));
        let room = usize::from(block.inner(*part).width);
        let start = status.history.len().saturating_sub(room);
        let line = Sparkline::default()
            .data(&status.history[start..])
            .style(Style::new().fg(Color::Cyan))
            .block(block);
        frame.render_widget(line, *part);
    }
}

/// The last events of all, as many as there is room for.
fn events_of(found: &[Found], area: Rect) -> Paragraph<'static> {
    let mut events: Vec<(&Status, &Happened)> = statuses(found)
        .flat_map(|status| status.events.iter().map(move |event| (status, event)))
        .collect();
    events.sort_by_key(|(_, event)| event.unix_ms);
    // Those that do not answer come last, where they are seen.
    let silent = found.iter().filter_map(|found| {
        let why = found.outcome.as_ref().err()?;
        let text = format!("{}, process {}: {why}", found.name, found.pid);
        Some(Line::from(Span::styled(text, ALARM)))
    });
    let lines = events.iter().map(|(status, event)| {
        let when = format!(
            "{} {} {} epoch {} position {}  ",
            time_of_day(event.unix_ms),
            status.name,
            status.role.word(),
            event.epoch,
            event.position
        );
        let style = if event.loud { BOLD } else { Style::new() };
        Line::from(vec![
            Span::styled(when, FAINT),
            Span::styled(event.text.clone(), style),
        ])
    });
    let mut lines: Vec<Line<'static>> = lines.chain(silent).collect();
    // Its title above, its keys below.
    let room = usize::from(area.height.saturating_sub(2));
    lines.drain(..lines.len().saturating_sub(room));
    Paragraph::new(lines).block(
        Block::new()
            .borders(Borders::TOP)
            .border_style(FAINT)
            .title(Span::styled(" events ", BOLD))
            .title_bottom(Line::from(Span::styled(" q ends ", FAINT)).right_aligned()),
    )
}
