//! What was found, what became of it, and why.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

/// An instruction whose outcome is not a function of the guest's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Instruction {
    /// Read the time-stamp counter.
    Rdtsc,
    /// Read it, with the CPU's number.
    Rdtscp,
    /// Draw a random number.
    Rdrand,
    /// Draw a seed.
    Rdseed,
}

impl Instruction {
    /// As assemblers write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rdtsc => "rdtsc",
            Self::Rdtscp => "rdtscp",
            Self::Rdrand => "rdrand",
            Self::Rdseed => "rdseed",
        }
    }
}

/// What a file is to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The kernel.
    Kernel,
    /// A part of it that is loaded later.
    Module,
    /// The kernel's library for programs, which is inside the kernel's file.
    Vdso,
    /// A program or a library.
    Program,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Module => "module",
            Self::Vdso => "vdso",
            Self::Program => "program",
        }
    }
}

/// What became of a site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// These bytes, in hexadecimal, stand there now.
    Rewritten(String),
    /// It is as it was, and this is why.
    Left(&'static str),
}

/// One instruction of the family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Site {
    /// The section it lies in.
    pub section: String,
    /// Symbol and distance, such as `native_sched_clock+0x13`; empty where no symbol is known.
    pub place: String,
    /// Its address; in a module how far into the section.
    pub address: u64,
    /// Where it is in the file.
    pub offset: usize,
    /// Which one.
    pub instruction: Instruction,
    /// The bytes that were found, in hexadecimal.
    pub old: String,
    /// What became of it.
    pub outcome: Outcome,
}

/// Code that was put in place of other code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The section it lies in.
    pub section: String,
    /// Symbol and distance.
    pub place: String,
    /// Its address.
    pub address: u64,
    /// Where it is in the file.
    pub offset: usize,
    /// The bytes that were found, in hexadecimal.
    pub old: String,
    /// The bytes that stand there now.
    pub new: String,
}

/// Bytes of a code section that could not be decoded and hold the bytes of RDTSC or RDTSCP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// The section.
    pub section: String,
    /// Symbol and distance of its first byte.
    pub place: String,
    /// Its address; in a module how far into the section.
    pub address: u64,
    /// How many bytes.
    pub length: usize,
}

/// What was found in one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// Its path, below whatever was prepared.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Every site, by section and address.
    pub sites: Vec<Site>,
    /// The readers of KVM's clock page, which count their reads now.
    pub changes: Vec<Change>,
    /// Those that could not be made to, by their symbols.
    pub uncounted: Vec<String>,
    /// Of a kernel: whether reads of the clock page are counted, by this preparation or by one before. Where none is, the guest reads the time
    /// at a port, or is to be preempted.
    pub counts_reads: bool,
    /// What could not be decoded and may hold more.
    pub suspicious: Vec<Gap>,
    /// Bytes of code that could not be decoded: tables between functions, mostly.
    pub undecoded: usize,
    /// Reads of the port that were there already: it was prepared before.
    pub prepared: usize,
    /// Whether a signature was taken off, because it would no longer be right.
    pub signature_stripped: bool,
    /// Why it was not looked into.
    pub skipped: Option<String>,
}

impl FileReport {
    pub(super) fn new(path: &str, kind: Kind) -> Self {
        Self {
            path: path.to_owned(),
            kind,
            sites: Vec::new(),
            changes: Vec::new(),
            uncounted: Vec::new(),
            counts_reads: false,
            suspicious: Vec::new(),
            undecoded: 0,
            prepared: 0,
            signature_stripped: false,
            skipped: None,
        }
    }

    pub(super) fn skipped(path: &str, kind: Kind, why: impl Into<String>) -> Self {
        Self {
            skipped: Some(why.into()),
            ..Self::new(path, kind)
        }
    }

    /// How many sites were rewritten.
    #[must_use]
    pub fn rewritten(&self) -> usize {
        self.sites
            .iter()
            .filter(|site| matches!(site.outcome, Outcome::Rewritten(_)))
            .count()
    }

    /// Whether there is anything to say of it.
    fn is_worth_a_word(&self) -> bool {
        !self.sites.is_empty()
            || !self.suspicious.is_empty()
            || self.skipped.is_some()
            || self.prepared > 0
    }
}

/// One line of the summary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Count {
    /// What kind of file.
    pub kind: Kind,
    /// The section; of a program they are counted together.
    pub section: String,
    /// Which instruction.
    pub instruction: Instruction,
    /// How many were rewritten.
    pub rewritten: usize,
    /// How many were left as they were.
    pub left: usize,
    /// In how many files.
    pub files: usize,
}

/// Everything that a preparation found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Files with sites, with gaps that may hold some, or that were not looked into.
    pub files: Vec<FileReport>,
    /// Kernel modules that were looked into.
    pub modules: usize,
    /// Programs and libraries that were looked into.
    pub programs: usize,
    /// Sites of all files.
    #[serde(skip)]
    sites: usize,
}

/// Sites of all files together at most: a distribution's have some thousands.
const SITES_MOST: usize = 1 << 18;

impl Report {
    /// Adds a file.
    pub fn add(&mut self, file: FileReport) {
        self.sites += file.sites.len();
        if file.skipped.is_none() {
            match file.kind {
                Kind::Module => self.modules += 1,
                Kind::Program => self.programs += 1,
                Kind::Kernel | Kind::Vdso => {}
            }
        }
        if file.is_worth_a_word() || file.kind == Kind::Kernel {
            self.files.push(file);
        }
    }

    /// Adds what another one has.
    pub fn extend(&mut self, other: Self) {
        self.files.extend(other.files);
        self.modules += other.modules;
        self.programs += other.programs;
        self.sites += other.sites;
    }

    /// Why there can be no more of it, if its files have more sites than any system's.
    pub(super) fn flood(&self) -> Option<String> {
        (self.sites > SITES_MOST)
            .then(|| format!("its programs have more than {SITES_MOST} places that would have to be rewritten, and no system's have so many"))
    }

    /// How many sites there are of each kind.
    #[must_use]
    pub fn counts(&self) -> Vec<Count> {
        let mut counts: BTreeMap<(Kind, String, Instruction), Count> = BTreeMap::new();
        for file in &self.files {
            let mut met = Vec::new();
            for site in &file.sites {
                let section = match file.kind {
                    Kind::Kernel => site.section.clone(),
                    _ => String::new(),
                };
                let key = (file.kind, section.clone(), site.instruction);
                let count = counts.entry(key.clone()).or_insert(Count {
                    kind: file.kind,
                    section,
                    instruction: site.instruction,
                    rewritten: 0,
                    left: 0,
                    files: 0,
                });
                match site.outcome {
                    Outcome::Rewritten(_) => count.rewritten += 1,
                    Outcome::Left(_) => count.left += 1,
                }
                if !met.contains(&key) {
                    count.files += 1;
                    met.push(key);
                }
            }
        }
        counts.into_values().collect()
    }

    /// The summary, for people.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut text =
            String::from("kind     section               instruction  rewritten  left  files\n");
        for count in self.counts() {
            let _ = writeln!(
                text,
                "{:<8} {:<21} {:<11} {:>10} {:>5} {:>6}",
                count.kind.name(),
                count.section,
                count.instruction.name(),
                count.rewritten,
                count.left,
                count.files
            );
        }
        let skipped = self
            .files
            .iter()
            .filter(|file| file.skipped.is_some())
            .count();
        let gaps: usize = self.files.iter().map(|file| file.suspicious.len()).sum();
        let _ = writeln!(
            text,
            "looked into {} modules and {} programs; {skipped} files not looked into, {gaps} stretches that may hold more",
            self.modules, self.programs
        );
        for kernel in self.files.iter().filter(|file| file.kind == Kind::Kernel) {
            let reads = "the kernel's reads of KVM's clock page";
            let _ = match (kernel.counts_reads, &kernel.uncounted[..]) {
                (true, []) => writeln!(text, "{reads} are counted"),
                (true, left) => writeln!(
                    text,
                    "{reads} are counted, but not in {}: time may stand still there for who waits for it",
                    left.join(", ")
                ),
                (false, _) => writeln!(
                    text,
                    "{reads} are not counted: it reads the time at a port (--clock timer), or is to be preempted"
                ),
            };
        }
        text
    }

    /// Every site, for people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = self.summary();
        for file in &self.files {
            let _ = write!(text, "\n{} {}", file.kind.name(), file.path);
            if let Some(why) = &file.skipped {
                let _ = writeln!(text, ": not looked into: {why}");
                continue;
            }
            let _ = writeln!(
                text,
                ": {} sites, {} rewritten",
                file.sites.len(),
                file.rewritten()
            );
            if file.prepared > 0 {
                let _ = writeln!(
                    text,
                    "  {} reads of the port are there already: prepared before",
                    file.prepared
                );
            }
            if file.signature_stripped {
                text.push_str("  its signature was taken off\n");
            }
            for site in &file.sites {
                let _ = write!(
                    text,
                    "  {} {:#x} {} {} {}",
                    site.section,
                    site.address,
                    if site.place.is_empty() {
                        "-"
                    } else {
                        &site.place
                    },
                    site.instruction.name(),
                    site.old
                );
                let _ = match &site.outcome {
                    Outcome::Rewritten(new) => writeln!(text, " -> {new}"),
                    Outcome::Left(why) => writeln!(text, " left: {why}"),
                };
            }
            for change in &file.changes {
                let _ = writeln!(
                    text,
                    "  {} {:#x} {} {} -> {}: its reads are counted",
                    change.section, change.address, change.place, change.old, change.new
                );
            }
            for gap in &file.suspicious {
                let _ = writeln!(
                    text,
                    "  {} {:#x} {} {} bytes are no code that can be decoded and may hold a site",
                    gap.section, gap.address, gap.place, gap.length
                );
            }
        }
        text
    }
}
