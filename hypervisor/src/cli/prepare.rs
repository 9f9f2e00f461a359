//! `doppel prepare`.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Args;
use hypervisor::prepare::{self, Limits, PrepareError, Report};

use super::Failure;

/// Rewrite a Linux kernel and its programs so that they can be replayed
#[derive(Debug, Args)]
#[command(
    after_help = "Writes into the directory of --out: vmlinux, initramfs.cpio, modules/, and what was found and done as report.txt and \
                  report.json. docs/preparing.md says what is rewritten and why.\n\
                  Examples:\n  doppel prepare --kernel /boot/vmlinuz-6.1.0-56-amd64 --initrd /boot/initrd.img-6.1.0-56-amd64 --out prepared\n  \
                  doppel prepare --kernel vmlinux --modules /lib/modules/6.1.0-56-amd64 --root ./rootfs --out prepared --json"
)]
pub struct PrepareArgs {
    /// The kernel: a bzImage or an ELF file
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The kernel's System.map, if it has no table of symbols in it
    #[arg(long, value_name = "System.map")]
    symbols: Option<PathBuf>,
    /// A directory of the kernel's modules
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// An initramfs: archives of cpio's, plain or packed by gzip, xz, zstd or lz4
    #[arg(long, value_name = "FILE", conflicts_with = "root")]
    initrd: Option<PathBuf>,
    /// A directory to make the initramfs of
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Where to put what was prepared; files of the same names are replaced
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print the whole report as one JSON object
    #[arg(long)]
    json: bool,
}

impl From<PrepareError> for Failure {
    fn from(error: PrepareError) -> Self {
        Self::new(Self::ERROR, error)
    }
}

pub fn prepare(args: &PrepareArgs) -> Result<(), Failure> {
    let limits = Limits::default();
    let read = |path: &PathBuf| read(path, limits);
    // Before anything is written.
    for from in args.root.iter().chain(&args.modules) {
        prepare::apart(&args.out, from)?;
    }
    let symbols = args.symbols.as_ref().map(read).transpose()?;
    let symbols = symbols.as_deref().map(String::from_utf8_lossy);
    let kernel = prepare::kernel(read(&args.kernel)?, symbols.as_deref(), limits)
        .map_err(|error| of(&args.kernel, &error))?;
    fs::create_dir_all(&args.out).map_err(|error| cannot("make", &args.out, &error))?;
    let mut report = kernel.report;
    write(&args.out, "vmlinux", &kernel.bytes)?;
    if let Some(map) =
        prepare::system_map(&kernel.bytes).map_err(|error| of(&args.kernel, &error))?
    {
        write(&args.out, "System.map", map.as_bytes())?;
    }
    if let Some(modules) = &args.modules {
        report.extend(prepare::modules(
            modules,
            &args.out.join("modules"),
            limits,
        )?);
    }
    let initramfs = match (&args.initrd, &args.root) {
        (Some(path), _) => {
            Some(prepare::initramfs(&read(path)?, limits).map_err(|error| of(path, &error))?)
        }
        (None, Some(root)) => Some(prepare::root(root, limits)?),
        (None, None) => None,
    };
    if let Some(initramfs) = initramfs {
        report.extend(initramfs.report);
        write(&args.out, "initramfs.cpio", &initramfs.bytes)?;
    }
    let json = json(&report);
    write(&args.out, "report.txt", report.text().as_bytes())?;
    write(&args.out, "report.json", json.as_bytes())?;
    if args.json {
        println!("{json}");
    } else {
        print!("{}", report.summary());
    }
    Ok(())
}

fn json(report: &Report) -> String {
    let object = serde_json::json!({ "counts": report.counts(), "report": report });
    object.to_string()
}

/// The whole file, unless it is larger than anything that is prepared.
fn read(path: &Path, limits: Limits) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| {
            file.take(limits.unpacked as u64 + 1)
                .read_to_end(&mut bytes)
        })
        .map_err(|error| cannot("read", path, &error))?;
    if bytes.len() > limits.unpacked {
        let why = format!("{} has more than {} bytes", path.display(), limits.unpacked);
        return Err(Failure::new(Failure::ERROR, why));
    }
    Ok(bytes)
}

/// Writes a file whole or not at all.
fn write(directory: &Path, name: &str, bytes: &[u8]) -> Result<(), Failure> {
    let path = directory.join(name);
    let fresh = directory.join(format!("{name}.new"));
    fs::write(&fresh, bytes)
        .and_then(|()| fs::rename(&fresh, &path))
        .map_err(|error| cannot("write", &path, &error))
}

fn of(path: &Path, error: &PrepareError) -> Failure {
    Failure::new(Failure::ERROR, format!("{}: {error}", path.display()))
}

fn cannot(doing: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(
        Failure::ERROR,
        format!("cannot {doing} {}: {error}", path.display()),
    )
}
