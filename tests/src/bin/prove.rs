//! `scripts/prove`: lists what Doppel promises, or shows one promise on this machine.
#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use doppel_tests::promise::{Form, Promise, Run, today};
use doppel_tests::promises::ALL;
use serde_json::{Value, json};

/// Show on this machine that Doppel does what it promises
#[derive(Debug, Parser)]
#[command(
    name = "scripts/prove",
    after_help = "Without a name: the list of promises. Examples:\n  scripts/prove\n  scripts/prove replay-exact\n  \
                  scripts/prove demo-loses-nothing --full --json"
)]
struct Arguments {
    /// The promise
    name: Option<String>,
    /// Only enough to notice that it broke (the default)
    #[arg(long, conflicts_with = "full")]
    short: bool,
    /// Everything the promise says
    #[arg(long)]
    full: bool,
    /// A part of the short form, for a host that is emulated
    #[arg(long, conflicts_with_all = ["short", "full"])]
    brief: bool,
    /// Where every random choice comes from; today's date if not given
    #[arg(long)]
    seed: Option<u64>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let Some(name) = &arguments.name else {
        list(arguments.json);
        return ExitCode::SUCCESS;
    };
    let Some(promise) = ALL.iter().find(|promise| promise.name == name) else {
        eprintln!("there is no promise {name:?}; scripts/prove lists them");
        return ExitCode::from(2);
    };
    show(promise, &arguments)
}

fn list(json: bool) {
    if json {
        let all: Vec<Value> = ALL
            .iter()
            .map(|promise| {
                json!({
                    "name": promise.name,
                    "promise": promise.line,
                    "short_seconds": promise.short.as_secs(),
                    "full_seconds": promise.full.as_secs(),
                })
            })
            .collect();
        println!("{}", Value::Array(all));
        return;
    }
    let width = ALL
        .iter()
        .map(|promise| promise.name.len())
        .max()
        .unwrap_or(0);
    for promise in ALL {
        println!(
            "{:width$}  {}  (short {}, full {})",
            promise.name,
            promise.line,
            time(promise.short),
            time(promise.full)
        );
    }
}

fn time(span: Duration) -> String {
    match span.as_secs() {
        seconds @ 0..=90 => format!("{seconds} s"),
        seconds => format!("{} min", seconds.div_ceil(60)),
    }
}

fn show(promise: &Promise, arguments: &Arguments) -> ExitCode {
    let form = match (arguments.full, arguments.brief) {
        (true, _) => Form::Full,
        (_, true) => Form::Brief,
        _ => Form::Short,
    };
    let run = Run {
        form,
        seed: arguments.seed.unwrap_or_else(today),
        chosen: arguments.seed.is_some(),
        talkative: std::io::stderr().is_terminal() || !arguments.json,
    };
    let started = Instant::now();
    let outcome = promise.run(&run);
    let seconds = started.elapsed().as_secs_f64();
    let (holds, figures, error) = match outcome {
        Ok(figures) => (true, Value::Object(figures.0), None),
        Err(error) => (false, Value::Null, Some(format!("{error:#}"))),
    };
    if arguments.json {
        let result = json!({
            "promise": promise.name,
            "holds": holds,
            "form": form.name(),
            "seed": run.seed,
            "seconds": (seconds * 10.0).round() / 10.0,
            "figures": figures,
            "error": error,
        });
        println!("{result}");
    } else {
        println!("{}: {}", promise.name, promise.line);
        if let Value::Object(figures) = &figures {
            let width = figures.keys().map(String::len).max().unwrap_or(0);
            for (name, value) in figures {
                println!("  {name:width$}  {value}");
            }
        }
        match &error {
            None => println!(
                "holds ({} form, seed {}, {seconds:.1} s)",
                form.name(),
                run.seed
            ),
            Some(error) => println!("DOES NOT HOLD (seed {}, {seconds:.1} s): {error}", run.seed),
        }
    }
    if holds {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
