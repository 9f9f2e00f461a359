//! `doppel secret`.

use std::path::PathBuf;

use clap::Args;
use hypervisor::handshake::Secret;

use super::Failure;

/// Make a pair's secret: both sides prove by it who they are
#[derive(Debug, Args)]
#[command(
    after_help = "Draws 32 random bytes into a new file that only its owner can read; a file that exists is left alone. Copy it to the \
                  other host over a safe way, such as scp -p, and name it on both sides by --secret FILE or pair.secret.\n\
                  Example: doppel secret machine.secret"
)]
pub struct SecretArgs {
    /// The new file
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub fn secret(args: &SecretArgs) -> Result<(), Failure> {
    Secret::create(&args.file).map_err(|error| Failure::new(Failure::ERROR, error))?;
    let file = args.file.display();
    eprintln!(
        "wrote {file}: copy it to the other host (scp -p {file} HOST:), then --secret {file} on both"
    );
    Ok(())
}
