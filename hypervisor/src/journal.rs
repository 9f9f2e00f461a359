//! Lines of the log: text for people, or one JSON object each; in a role every one has its machine, epoch and position.
#![forbid(unsafe_code)]

use std::fmt::{self, Debug};
use std::io::IsTerminal;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::backends::outflow::Standard;
use crate::control::board::{Board, Context};

/// How lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people, with colours on a terminal.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The role of this process, once it has one.
static ROLE: RwLock<Weak<Board>> = RwLock::new(Weak::new());

/// From now on lines say what this board's role says of itself.
pub(crate) fn speak_of(board: &Arc<Board>) {
    *ROLE.write().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(board);
}

fn role() -> Option<Context> {
    let role = ROLE.read().unwrap_or_else(PoisonError::into_inner);
    role.upgrade().map(|board| board.context())
}

/// Writes lines to standard error from now on; `DOPPEL_LOG` says which.
pub fn start(format: Format) {
    let ansi = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_env("DOPPEL_LOG").unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_writer(|| Standard::Error)
        .event_format(Lines { format, ansi })
        .init();
}

/// Formats lines.
struct Lines {
    format: Format,
    ansi: bool,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let mut fields = Fields(Map::new());
        event.record(&mut fields);
        let level = *event.metadata().level();
        let role = role();
        match self.format {
            Format::Text => text(&mut writer, &time, level, role, &fields.0, self.ansi),
            Format::Json => json(&mut writer, time, level, role, fields.0),
        }
    }
}

const MESSAGE: &str = "message";

fn text(
    to: &mut impl fmt::Write,
    time: &str,
    level: Level,
    role: Option<Context>,
    fields: &Map<String, Value>,
    ansi: bool,
) -> fmt::Result {
    let paint = |code: &str, text: &str| match ansi {
        true => format!("\x1b[{code}m{text}\x1b[0m"),
        false => text.to_owned(),
    };
    let colour = match level {
        Level::ERROR => "31",
        Level::WARN => "33",
        Level::INFO => "32",
        _ => "36",
    };
    write!(
        to,
        "{} {} ",
        paint("2", time),
        paint(colour, &format!("{level:>5}"))
    )?;
    if let Some(role) = role {
        let of = format!(
            "{} {} epoch={} position={}",
            role.name,
            role.role.word(),
            role.epoch,
            role.position
        );
        write!(to, "{} ", paint("2", &of))?;
    }
    if let Some(Value::String(message)) = fields.get(MESSAGE) {
        write!(to, "{message}")?;
    }
    for (name, value) in fields.iter().filter(|(name, _)| *name != MESSAGE) {
        write!(to, " {}={value}", paint("3", name))?;
    }
    writeln!(to)
}

fn json(
    to: &mut impl fmt::Write,
    time: String,
    level: Level,
    role: Option<Context>,
    fields: Map<String, Value>,
) -> fmt::Result {
    let mut line = Map::new();
    line.insert("time".into(), time.into());
    line.insert("level".into(), level.to_string().to_lowercase().into());
    if let Some(role) = role {
        line.insert("name".into(), role.name.into());
        line.insert("role".into(), role.role.word().into());
        line.insert("epoch".into(), role.epoch.into());
        line.insert("position".into(), role.position.into());
    }
    // What a line says itself counts.
    line.extend(fields);
    writeln!(to, "{}", Value::Object(line))
}

/// The fields of a line.
struct Fields(Map<String, Value>);

impl Fields {
    fn set(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.set(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::status::Role;

    fn context() -> Option<Context> {
        Some(Context {
            name: "kv".into(),
            role: Role::Backup,
            epoch: 3,
            position: 12_345,
        })
    }

    fn fields() -> Map<String, Value> {
        let mut fields = Map::new();
        fields.insert(MESSAGE.into(), "change of role: \"live\"\nnow".into());
        fields.insert("event".into(), "live".into());
        fields
    }

    #[test]
    fn a_line_of_json_is_one_object_with_epoch_and_position() {
        let mut to = String::new();
        json(&mut to, "now".into(), Level::WARN, context(), fields()).unwrap();
        assert_eq!(to.lines().count(), 1);
        let line: Value = serde_json::from_str(&to).unwrap();
        assert_eq!(line["epoch"], 3);
        assert_eq!(line["position"], 12_345);
        assert_eq!(line["level"], "warn");
        assert_eq!(line["role"], "backup");
        assert_eq!(line["event"], "live");
        assert_eq!(line["message"], "change of role: \"live\"\nnow");
    }

    #[test]
    fn a_line_of_text_has_them_too_and_colours_only_where_they_are_wanted() {
        let line = |ansi| {
            let mut to = String::new();
            text(&mut to, "now", Level::INFO, context(), &fields(), ansi).unwrap();
            to
        };
        let plain = line(false);
        assert!(plain.starts_with("now  INFO kv backup epoch=3 position=12345 change of role"));
        assert!(plain.ends_with("event=\"live\"\n") && !plain.contains('\x1b'));
        assert!(line(true).contains("\x1b[32m INFO\x1b[0m"));
    }
}
