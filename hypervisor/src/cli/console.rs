//! `doppel console`: a machine's console, interactive.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use hypervisor::backends::console::RawInput;
use hypervisor::control::default_run_dir;
use hypervisor::control::visit::{Here, Left, Visit, Way};

use super::Failure;

/// Look at a machine's console, and type at it; after a failover it goes on with the survivor
#[derive(Debug, Args)]
#[command(
    after_help = "Whoever looks may type. At a terminal every key goes to the guest, Ctrl-C too, but the one that ends this. What comes from \
                  a pipe is typed as fast as the guest takes it.\nExamples:\n  doppel console kv\n  \
                  printf 'uptime\\n' | doppel console kv"
)]
pub struct ConsoleArgs {
    /// The machine
    name: String,
    #[command(flatten)]
    look: LookArgs,
    /// Directory of the roles' control sockets [default: $XDG_RUNTIME_DIR/doppel, or /run/doppel]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

// What is looked at is said at the command.
#[derive(Debug, Args)]
pub struct LookArgs {
    /// The key that ends it, with Ctrl: ^] or ^A to ^Z; or none
    #[arg(long, value_name = "KEY", default_value = "^]", value_parser = key)]
    escape: Key,
    /// Begin with all that is kept of what came before (64 KiB), and not only the last 4 KiB
    #[arg(long)]
    all: bool,
    /// Type nothing
    #[arg(long)]
    read_only: bool,
}

#[derive(Clone, Copy, Debug)]
struct Key(Option<u8>);

fn key(text: &str) -> Result<Key, String> {
    match *text.as_bytes() {
        [
            b'^',
            key @ (b']' | b'\\' | b'^' | b'_' | b'a'..=b'z' | b'A'..=b'Z'),
        ] => Ok(Key(Some(key.to_ascii_uppercase() & 0x1f))),
        _ if text == "none" => Ok(Key(None)),
        _ => Err("a key is ^] or ^A to ^Z, or none".to_owned()),
    }
}

pub fn console(args: &ConsoleArgs) -> Result<(), Failure> {
    let directory = args.run_dir.clone().unwrap_or_else(default_run_dir);
    look(
        &args.name,
        &args.look,
        Arc::new(Here { directory }),
        "on this host",
    )
}

/// Looks at the machine's console by this way; `here` says where it is looked for.
pub fn look(name: &str, args: &LookArgs, way: Arc<dyn Way>, here: &str) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(Failure::ERROR, error);
    let signals = signals().map_err(|error| failed(&format!("cannot catch signals: {error}")))?;
    let visit = Visit {
        name: name.to_owned(),
        escape: args.escape.0,
        all: args.all,
        only_look: args.read_only,
    };
    let input = RawInput::open().map_err(|error| failed(&error))?;
    let at_terminal = input.is_terminal();
    if let (true, Some(key)) = (at_terminal, args.escape.0) {
        eprintln!(
            "[doppel: console of {name}; Ctrl-{} leaves it]",
            char::from(key | 0x40)
        );
    }
    let left = visit
        .run(way, input, io::stdout().lock(), signals, |what| {
            eprintln!("[doppel: {what}]");
        })
        .map_err(|error| failed(&error))?;
    match left {
        Left::Over => eprintln!("[doppel: machine {name} is not served {here} any more]"),
        Left::Escaped => eprintln!("\n[doppel: left the console of {name}]"),
        Left::Signalled | Left::OutputClosed => {}
    }
    Ok(())
}

/// A socket that becomes readable when a signal comes that would end the process and leave its terminal as it is.
fn signals() -> io::Result<UnixStream> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
    let (reading, writing) = UnixStream::pair()?;
    reading.set_nonblocking(true)?;
    for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
        signal_hook::low_level::pipe::register(signal, writing.try_clone()?)?;
    }
    Ok(reading)
}
