//! The hidden command that runs a role's hook for it.

use std::time::Duration;

use clap::Args;
use hypervisor::control::hook;

use super::Failure;

/// Run a command for each change of role that standard input tells: a role starts this
#[derive(Debug, Args)]
pub struct HookArgs {
    /// The command, for sh -c
    #[arg(long)]
    command: String,
    /// How long it may take each time
    #[arg(long, value_name = "MS")]
    within_ms: u64,
    /// Hand on what it prints: it is not to wait for whoever reads that
    #[arg(long)]
    relay: bool,
}

pub fn help(args: &HookArgs) -> Result<(), Failure> {
    hook::help(
        &args.command,
        Duration::from_millis(args.within_ms),
        args.relay,
    )
    .map_err(|error| Failure::new(Failure::ERROR, error))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_role_and_the_command_line_agree_on_its_name() {
        let names: Vec<String> = crate::cli::Cli::command()
            .get_subcommands()
            .map(|command| command.get_name().to_owned())
            .collect();
        assert!(
            names
                .iter()
                .any(|name| name == hypervisor::control::hook::HELPER)
        );
    }
}
