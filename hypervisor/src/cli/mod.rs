//! Arguments and printing; everything else is in the library.

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

use std::fmt::Display;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use hypervisor::journal::{self, Format};
use hypervisor::protocol::Reason;
use hypervisor::record::Ended;
use hypervisor::replay::ReplayError;
use hypervisor::session::SessionError;
use hypervisor::session::serve::Served;

/// A fault-tolerant hypervisor: one virtual machine on two hosts at once.
#[derive(Debug, Parser)]
#[command(
    name = "doppel",
    version,
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
            SessionError::Interrupted => Self::new(0, error),
            SessionError::Replay(
                ReplayError::Diverged(_) | ReplayError::Log(_) | ReplayError::Entry { .. },
            ) => Self::new(Self::DIVERGED, error),
            _ => Self::new(Self::ERROR, error),
        }
    }
}

pub fn main() -> ExitCode {
    let cli = Cli::parse();
    journal::start(cli.log_format.into());
    if matches!(
        cli.command,
        Command::Agent(_)
            | Command::Run(_)
            | Command::Primary(_)
            | Command::Backup(_)
            | Command::Record(_)
    ) {
        hypervisor::sandbox::keep_files_private();
    }
    let outcome = match cli.command {
        Command::Agent(args) => agent::agent(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Run(args) => machine::run(&args),
        Command::Primary(args) => pair::primary(&args),
        Command::Backup(args) => pair::backup(&args),
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
        Command::PackageFiles(args) => package::write(&args, Cli::command()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("doppel: {}", failure.message);
            ExitCode::from(failure.code)
        }
    }
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
            "the guest crashed: a triple fault, or a halt with interrupts off",
        )),
    }
}

/// How a side's end is told.
fn served(served: &Served) -> Result<(), Failure> {
    match (&served.reason, served.guest) {
        (Reason::PoweredOff, Some(ended)) => guest_ended(ended),
        (Reason::PoweredOff, None) | (Reason::HandedOver { .. } | Reason::Relieved { .. }, _) => {
            Ok(())
        }
        (reason, _) => Err(Failure::new(Failure::REPLACED, reason)),
    }
}
