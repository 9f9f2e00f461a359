//! What a promise is, and how one is run.
#![forbid(unsafe_code)]

use std::sync::Mutex;
use std::time::Duration;

use rdma_log::locks::lock;
use serde_json::{Map, Value};

/// How much is done to show a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A part of the short form, in a host that is emulated.
    Brief,
    /// Enough to notice that it broke; part of every test run.
    Short,
    /// Everything the promise says.
    Full,
}

impl Form {
    /// `short` or `full`, whichever form this is.
    #[must_use]
    pub fn pick<T>(self, short: T, full: T) -> T {
        match self {
            Self::Brief | Self::Short => short,
            Self::Full => full,
        }
    }

    /// How many: `short` or `full`; where emulation makes each take ten times as long, a tenth of the short form's.
    #[must_use]
    pub fn count(self, short: u64, full: u64) -> u64 {
        match self {
            Self::Brief => short.div_ceil(10),
            _ => self.pick(short, full),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Brief => "brief",
            Self::Short => "short",
            Self::Full => "full",
        }
    }
}

/// One run of a promise.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// How much to do.
    pub form: Form,
    /// Where every random choice of the run comes from.
    pub seed: u64,
    /// Whether somebody asked for this very seed: to see again what it showed.
    pub chosen: bool,
    /// Whether to say on standard error how it goes.
    pub talkative: bool,
}

impl Run {
    /// Says how it goes.
    pub fn say(&self, line: impl std::fmt::Display) {
        if self.talkative {
            eprintln!("  {line}");
        }
    }
}

/// What a run measured: names and values for people and scripts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures(pub Map<String, Value>);

impl Figures {
    /// Adds one.
    pub fn add(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.to_owned(), value.into());
    }
}

/// Something that Doppel promises.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    /// Its name, as `scripts/prove` takes it.
    pub name: &'static str,
    /// What it says, in one line.
    pub line: &'static str,
    /// How long the short form takes, about.
    pub short: Duration,
    /// How long the full form takes, about.
    pub full: Duration,
    /// Shows it: an error says what does not hold.
    pub show: fn(&Run) -> anyhow::Result<Figures>,
}

/// Promises measure time on a small machine: one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

impl Promise {
    /// Runs it.
    ///
    /// # Errors
    /// What does not hold.
    pub fn run(&self, run: &Run) -> anyhow::Result<Figures> {
        let _alone = lock(&ONE_AT_A_TIME);
        (self.show)(run)
    }

    /// Runs the short form as a test, with a seed that changes from day to day and is printed.
    ///
    /// # Panics
    /// If it does not hold.
    pub fn test(&self) {
        let seed = today();
        let run = Run {
            form: Form::Short,
            seed,
            chosen: false,
            talkative: true,
        };
        match self.run(&run) {
            Ok(figures) => eprintln!("{}: {}", self.name, Value::Object(figures.0)),
            Err(error) => panic!("{} does not hold (seed {seed}): {error:#}", self.name),
        }
    }
}

/// Days since 1970: the default seed, so that a run can be repeated on the same day without noting anything.
#[must_use]
pub fn today() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() / 86_400)
}
