//! Arguments and printing; everything else is in the rest of the library.
#![forbid(unsafe_code)]

mod agent;
mod console;
mod demo;
mod doctor;
mod figures;
mod hook;
mod machine;
mod order;
mod package;
mod pair;
mod prepare;
mod record;
mod replay;
mod secret;
mod slurm;
mod status;
mod top;
mod vm;

use std::ffi::OsString;
use std::fmt::Display;
use std::process::ExitCode;
use std::sync::LazyLock;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use hypervisor::backends::outflow::{self, Standard};
use hypervisor::journal::{self, Format};
use hypervisor::protocol::Reason;
use hypervisor::record::Ended;
use hypervisor::replay::ReplayError;
use hypervisor::session::SessionError;
use hypervisor::session::serve::Served;
use hypervisor::version::Versions;

static LONG_VERSION: LazyLock<String> = LazyLock::new(|| {
    format!(
        "{}\nspeaks {} with a peer (docs/formats.md)",
        env!("CARGO_PKG_VERSION"),
        Versions::OURS
    )
});

/// A fault-tolerant hypervisor: one virtual machine on two hosts at once.
#[derive(Debug, Parser)]
#[command(
    name = "doppel",
    version,
    long_version = LONG_VERSION.as_str(),
    after_help = "Exit codes:\n  \
        0  well: the guest turned itself off, or the role was ended on purpose\n  \
        1  a failure; the message says what to do\n  \
        2  wrong usage or configuration\n  \
        3  another process has taken the machine over, or this copy is of no use to it\n  \
        4  a replay diverged, or its log is unusable\n  \
        5  the guest crashed, or turned itself off with a status other than 0\n\n\
        Example: doppel demo"
)]
struct Cli {
    /// How lines of the log look: for people, or one JSON object each
    #[arg(long, global = true, value_enum, default_value = "text")]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

impl From<LogFormat> for Format {
    fn from(format: LogFormat) -> Self {
        match format {
            LogFormat::Text => Self::Text,
            LogFormat::Json => Self::Json,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    Agent(agent::AgentArgs),
    Demo(demo::DemoArgs),
    Doctor(doctor::DoctorArgs),
    Run(machine::RunArgs),
    Primary(pair::PrimaryArgs),
    Backup(pair::BackupArgs),
    Prepare(prepare::PrepareArgs),
    Record(record::RecordArgs),
    Replay(replay::ReplayArgs),
    Secret(secret::SecretArgs),
    Slurm(slurm::SlurmArgs),
    Status(status::StatusArgs),
    Console(console::ConsoleArgs),
    Switch(order::SwitchArgs),
    MigrateBackup(order::MigrateBackupArgs),
    PowerOff(order::PowerOffArgs),
    Reset(order::ResetArgs),
    Pause(order::PauseArgs),
    Resume(order::ResumeArgs),
    Share(order::ShareArgs),
    Top(top::TopArgs),
    Vm(vm::VmArgs),
    #[command(hide = true)]
    HookHelper(hook::HookArgs),
    #[command(hide = true)]
    SlurmNode(slurm::KeeperArgs),
    #[command(hide = true)]
    PackageFiles(package::PackageArgs),
}

/// An exit code with its message.
#[derive(Debug)]
struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    const ERROR: u8 = 1;
    const USAGE: u8 = 2;
    const REPLACED: u8 = 3;
    const DIVERGED: u8 = 4;
    const GUEST: u8 = 5;

    fn new(code: u8, message: impl Display) -> Self {
        Self {
            code,
            message: message.to_string(),
        }
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        match &error {
            SessionError::Interrupted | SessionError::Dismissed => Self::new(0, error),
            SessionError::Replay(
                ReplayError::Diverged(_) | ReplayError::Log(_) | ReplayError::Entry { .. },
            ) => Self::new(Self::DIVERGED, error),
            _ => Self::new(Self::ERROR, error),
        }
    }
}

/// What `doppel` does with its own arguments.
#[must_use]
pub fn main() -> ExitCode {
    run(std::env::args_os(), Versions::OURS)
}

/// The command line's description: what may be said, and what each word means. Nothing is done by parsing.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// What `doppel` does with these arguments, its name first, where it speaks these versions with a peer.
#[must_use]
pub fn run(arguments: impl IntoIterator<Item = OsString>, versions: Versions) -> ExitCode {
    let cli = Cli::parse_from(arguments);
    journal::start(cli.log_format.into());
    if matches!(
        cli.command,
        Command::Agent(_)
            | Command::Run(_)
            | Command::Primary(_)
            | Command::Backup(_)
            | Command::Record(_)
            // gdb's socket.
            | Command::Replay(_)
    ) {
        hypervisor::sandbox::keep_files_private();
        hypervisor::panics::watch();
    }
    let outcome = match cli.command {
        Command::Agent(args) => agent::agent(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Run(args) => machine::run(&args),
        Command::Primary(args) => pair::primary(&args, versions),
        Command::Backup(args) => pair::backup(&args, versions),
        Command::Prepare(args) => prepare::prepare(&args),
        Command::Record(args) => record::record(&args),
        Command::Replay(args) => replay::replay(&args),
        Command::Secret(args) => secret::secret(&args),
        Command::Slurm(args) => slurm::slurm(&args),
        Command::SlurmNode(args) => slurm::keep(&args),
        Command::Status(args) => status::status(&args),
        Command::Console(args) => console::console(&args),
        Command::Switch(args) => order::switch(&args),
        Command::MigrateBackup(args) => order::migrate_backup(&args),
        Command::PowerOff(args) => order::power_off(&args),
        Command::Reset(args) => order::reset(&args),
        Command::Pause(args) => order::pause(&args),
        Command::Resume(args) => order::resume(&args),
        Command::Share(args) => order::share(&args),
        Command::Top(args) => top::top(&args),
        Command::Vm(args) => vm::vm(&args),
        Command::HookHelper(args) => hook::help(&args),
        Command::PackageFiles(args) => package::write(&args, command()),
    };
    let code = match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // A terminal that is stopped takes nothing; the process ends all the same.
            let _ = Standard::Error.say(format!("doppel: {}\n", failure.message).as_bytes());
            ExitCode::from(failure.code)
        }
    };
    outflow::settle();
    code
}

/// How a guest's end is told.
fn guest_ended(ended: Ended) -> Result<(), Failure> {
    match ended {
        Ended::PoweredOff(0) | Ended::Stopped => Ok(()),
        Ended::PoweredOff(status) => Err(Failure::new(
            Failure::GUEST,
            format!("the guest turned itself off with status {status}"),
        )),
        Ended::Crashed => Err(Failure::new(
            Failure::GUEST,
            "the guest crashed: a triple fault, or a halt with interrupts off (the log says which)",
        )),
    }
}

/// How a side's end is told.
fn served(served: &Served) -> Result<(), Failure> {
    match (&served.reason, served.guest) {
        (Reason::PoweredOff, Some(ended)) => guest_ended(ended),
        (reason, _) if reason.is_clean() => Ok(()),
        (reason, _) => Err(Failure::new(Failure::REPLACED, reason)),
    }
}
