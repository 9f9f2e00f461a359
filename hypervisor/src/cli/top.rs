//! `doppel top`.

mod draw;

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use hypervisor::control::find::Found;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::crossterm::terminal;

use super::Failure;
use super::status::FindArgs;

/// Between two looks at the roles.
const EVERY: Duration = Duration::from_millis(500);

/// Of a frame that is printed, where no terminal says.
const SIZE: (u16, u16) = (120, 30);

/// Watch the machines of this host: roles, epoch, lag, commit latency, throughput, events
#[derive(Debug, Args)]
#[command(
    after_help = "q, Esc or Ctrl-C ends it.\nExamples:\n  doppel top kv\n  doppel top --once"
)]
pub struct TopArgs {
    #[command(flatten)]
    which: FindArgs,
    /// Print one frame and end
    #[arg(long)]
    once: bool,
}

pub fn top(args: &TopArgs) -> Result<(), Failure> {
    let found = args.which.find()?;
    if found.is_empty() {
        return Err(args.which.nobody());
    }
    if args.once {
        let width = match std::io::stdout().is_terminal() {
            true => terminal::size().map_or(SIZE.0, |(width, _)| width),
            false => SIZE.0,
        };
        print!("{}", frame(&found, width, SIZE.1));
        return Ok(());
    }
    if !std::io::stdout().is_terminal() {
        return Err(Failure::new(
            Failure::USAGE,
            "standard output is no terminal: doppel top --once prints one frame",
        ));
    }
    // The terminal is as it was before however this ends, by a panic too.
    let mut terminal = ratatui::init();
    let outcome = watch(args, &mut terminal, found);
    ratatui::restore();
    outcome
}

fn watch(
    args: &TopArgs,
    terminal: &mut ratatui::DefaultTerminal,
    mut found: Vec<Found>,
) -> Result<(), Failure> {
    let failed = |error: std::io::Error| {
        Failure::new(
            Failure::ERROR,
            format!("the terminal cannot be used: {error}"),
        )
    };
    let mut next = Instant::now() + EVERY;
    loop {
        terminal
            .draw(|frame| draw::draw(frame, &found))
            .map_err(failed)?;
        if event::poll(next.saturating_duration_since(Instant::now())).map_err(failed)?
            && let Event::Key(key) = event::read().map_err(failed)?
            && ends(key)
        {
            return Ok(());
        }
        if Instant::now() >= next {
            found = args.which.find()?;
            next = Instant::now() + EVERY;
        }
    }
}

fn ends(key: KeyEvent) -> bool {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind != KeyEventKind::Release
        && match key.code {
            KeyCode::Char('q') | KeyCode::Esc => true,
            KeyCode::Char('c') => control,
            _ => false,
        }
}

/// One frame as lines of text.
fn frame(found: &[Found], width: u16, height: u16) -> String {
    let Ok(mut terminal) = Terminal::new(TestBackend::new(width, height));
    let Ok(_) = terminal.draw(|frame| draw::draw(frame, found));
    let buffer = terminal.backend().buffer();
    let mut text = String::new();
    for row in 0..height {
        let line: String = (0..width)
            .map(|column| buffer[(column, row)].symbol())
            .collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::tests::found;
    use hypervisor::control::status::{Role, Standing};

    #[test]
    fn q_escape_and_control_c_end_it_and_nothing_else_does() {
        let key = |code, modifiers| ends(KeyEvent::new(code, modifiers));
        assert!(key(KeyCode::Char('q'), KeyModifiers::NONE));
        assert!(key(KeyCode::Esc, KeyModifiers::NONE));
        assert!(key(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert!(!key(KeyCode::Char('c'), KeyModifiers::NONE));
        assert!(!key(KeyCode::Enter, KeyModifiers::NONE));
    }

    #[test]
    fn a_frame_shows_both_roles_and_their_figures() {
        let pair = [
            found("kv", Role::Backup, Standing::Following),
            found("kv", Role::Primary, Standing::Protected),
        ];
        let text = frame(&pair, 120, 30);
        for word in [
            "kv",
            "PROTECTED",
            "epoch 3",
            "primary",
            "backup",
            "following",
            "12,345",
            "210.0 µs",
            "1.20 µs",
            "3.40 µs",
            "120.0 µs",
            "live in epoch 3",
            "exits/s",
            "█",
        ] {
            assert!(text.contains(word), "{word} is not in\n{text}");
        }
        assert!(!text.contains("UNPROTECTED"), "{text}");
    }

    #[test]
    fn a_narrow_terminal_keeps_what_matters_most() {
        let pair = [found("kv", Role::Primary, Standing::Protected)];
        let text = frame(&pair, 80, 24);
        for word in [
            "kv",
            "primary",
            "protected 1 min 5 s",
            "3",
            "210.0 µs",
            "1.20 µs",
        ] {
            assert!(text.contains(word), "{word} is not in\n{text}");
        }
        assert!(!text.contains("PEER"), "{text}");
    }

    #[test]
    fn an_unprotected_machine_fills_the_banner() {
        let alone = [found("kv", Role::Primary, Standing::Unprotected)];
        let text = frame(&alone, 100, 24);
        assert!(
            text.lines().next().unwrap().contains("UNPROTECTED"),
            "{text}"
        );
    }

    #[test]
    fn the_smallest_terminal_and_a_silent_role_do_not_upset_it() {
        let silent = [Found {
            name: "kv".into(),
            pid: 9,
            outcome: Err("it has not answered for 2 s".into()),
        }];
        assert!(frame(&silent, 100, 20).contains("has not answered"));
        for size in [(1, 1), (10, 3), (80, 5), (300, 100)] {
            frame(&silent, size.0, size.1);
            frame(
                &[found("kv", Role::Primary, Standing::Protected)],
                size.0,
                size.1,
            );
        }
        frame(&[], 80, 24);
    }
}
