//! `doppel package-files`: what a package has beside the program, made from the command line's own description.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_complete::{Shell, generate_to};

use super::Failure;

/// Write the manual pages and the shells' completions, for a package
#[derive(Debug, Args)]
pub struct PackageArgs {
    /// Where: `man` and `completions` are made in it
    #[arg(value_name = "DIRECTORY")]
    directory: PathBuf,
}

/// The program's name, whatever its file is called.
const NAME: &str = "doppel";

pub fn write(args: &PackageArgs, command: Command) -> Result<(), Failure> {
    let failed = |path: &Path, error| {
        Failure::new(
            Failure::ERROR,
            format!("cannot write to {}: {error}", path.display()),
        )
    };
    let make = |name: &str| {
        let path = args.directory.join(name);
        match fs::create_dir_all(&path) {
            Ok(()) => Ok(path),
            Err(error) => Err(failed(&path, error)),
        }
    };
    let (man, completions) = (make("man")?, make("completions")?);
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut command.clone(), NAME, &completions)
            .map_err(|error| failed(&completions, error))?;
    }
    clap_mangen::generate_to(command, &man).map_err(|error| failed(&man, error))
}
